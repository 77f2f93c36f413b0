"""Remote storage (a web server, a file system in memory) and a folder of images."""

import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest

from datamodules import remote
from tests.support.shards import encoded

SHARD = bytes(range(256)) * 40


class Server(ThreadingHTTPServer):
    """Serves ``files`` and counts requests; fails, stalls or cuts answers on demand."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.requests: Counter[str] = Counter()
        self.failures = 0
        self.status = 503
        self.stall = threading.Event()
        self.stalls = False
        self.tells_size = True
        self.cut = 0
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        body = self.answer()
        if self.server.stalls:
            self.wfile.write(body[:100])
            self.wfile.flush()
            self.server.stall.wait(20)
        else:
            self.wfile.write(body[: len(body) - self.server.cut])

    def answer(self) -> bytes:
        server = self.server
        server.requests[self.command] += 1
        body = server.files.get(self.path.partition("?")[0])
        status = 404 if body is None else 200
        if server.failures:
            server.failures -= 1
            status = server.status
        body = (body if status == 200 else None) or b""
        self.send_response(status)
        if server.tells_size:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        return body

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "WAIT_SECONDS", (0.01, 0.02, 0.03))
    monkeypatch.setenv("NO_PROXY", "*")


@pytest.fixture
def server(quick: None) -> Iterator[Server]:
    server = Server()
    server.files = {f"/train-{number}.tar": SHARD for number in range(4)}
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.stall.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def memory(quick: None) -> Iterator[str]:
    system = fsspec.filesystem("memory")
    for number in range(4):
        system.pipe(f"/staging/train-{number}.tar", bytes([number]) * 100)
    yield "memory://staging"
    system.rm("/staging", recursive=True)


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    for label, name in enumerate(("cat", "dog", "eel")):
        (tmp_path / "source" / name).mkdir(parents=True)
        for number, (form, extension) in enumerate([("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp")]):
            data = encoded((12, 16), form, seed=3 * label + number)
            (tmp_path / "source" / name / f"{number}.{extension}").write_bytes(data)
    return tmp_path / "source"
