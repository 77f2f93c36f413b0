"""Copies of remote shards: downloads, limits, and failures of servers and processes."""

import multiprocessing
import os
import threading
from pathlib import Path

import fsspec
import pytest

from datamodules import remote
from datamodules.remote import sizes
from datamodules.shards import ShardError
from datamodules.staging import Staging, _locked, local_name
from tests.datamodules.conftest import SHARD, Server

FORK = multiprocessing.get_context("fork")
SIZE = len(SHARD)


def files(folder: Path) -> list[str]:
    """Return the names in a staging folder without the lock files."""
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def in_forked_process(function, *arguments) -> object:
    """Return the result of a function in a forked process, or its exit status if it takes more than five seconds."""
    queue = FORK.SimpleQueue()
    process = FORK.Process(target=lambda: queue.put(function(*arguments)))
    process.start()
    process.join(5)
    if process.exitcode != 0:
        process.kill()
        return f"exit status {process.exitcode}"
    return queue.get()


class TestCopies:
    """A copy is complete or absent."""

    def test_one_download_then_none(self, server: Server, tmp_path: Path) -> None:
        staging = Staging(str(tmp_path / "new" / "folder"))
        url = f"{server.url}/train-0.tar"
        path = staging.path(url, SIZE)
        assert Path(path).read_bytes() == SHARD
        assert path == staging.path(url, SIZE) == str(tmp_path / "new" / "folder" / local_name(url))
        assert server.requests == {"GET": 1}
        with staging.open(url, SIZE) as file:
            assert os.pread(file.fileno(), 9, 256) == SHARD[:9]

    def test_names_are_readable_and_differ(self) -> None:
        urls = [
            "http://a/x/train 0.tar",
            "http://b/x/train 0.tar",
            "http://a/x/train 0.tar?version=2",
            f"s3://b/{'é' * 300}",
        ]
        names = [local_name(url) for url in urls]
        assert len(set(names)) == 4
        assert all(name.endswith("-train_0.tar") for name in names[:3])
        assert max(map(len, names)) <= 117

    def test_other_size_is_downloaded_again(self, server: Server, tmp_path: Path) -> None:
        staging = Staging(str(tmp_path))
        url = f"{server.url}/train-0.tar"
        path = Path(staging.path(url, SIZE))
        path.write_bytes(SHARD[:-1])
        assert Path(staging.path(url, SIZE)).read_bytes() == SHARD
        assert server.requests["GET"] == 2

    @pytest.mark.parametrize("tells_size", [True, False])
    def test_a_cut_download_never_gets_the_name(self, server: Server, tmp_path: Path, tells_size: bool) -> None:
        server.tells_size, server.cut = tells_size, 1
        with pytest.raises(ShardError, match=r"train-0.tar cannot be downloaded") as caught:
            Staging(str(tmp_path)).path(f"{server.url}/train-0.tar", SIZE)
        assert ("PayloadError" if tells_size else f"got {SIZE - 1} bytes, expected {SIZE}") in str(caught.value)
        assert server.requests["GET"] == 4
        assert files(tmp_path) == []

    def test_a_server_that_fails_three_times(self, server: Server, tmp_path: Path) -> None:
        server.failures = 3
        assert Path(Staging(str(tmp_path)).path(f"{server.url}/train-0.tar", SIZE)).read_bytes() == SHARD
        server.failures = 4
        with pytest.raises(ShardError, match=r"train-1.tar cannot be downloaded .*503"):
            Staging(str(tmp_path)).path(f"{server.url}/train-1.tar", SIZE)

    def test_a_missing_shard_is_asked_for_once(self, server: Server, tmp_path: Path) -> None:
        with pytest.raises(ShardError, match=r"none.tar cannot be downloaded .*FileNotFound"):
            Staging(str(tmp_path)).path(f"{server.url}/none.tar", SIZE)
        assert server.requests == {"GET": 1}

    def test_a_server_that_stalls(self, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(remote, "TIMEOUT_SECONDS", 0.1)
        server.stalls = True
        with pytest.raises(ShardError, match=r"train-0.tar cannot be downloaded \(.*Timeout"):
            Staging(str(tmp_path)).path(f"{server.url}/train-0.tar", SIZE)
        assert server.requests == {"GET": 4}
        assert files(tmp_path) == []

    def test_a_folder_that_cannot_be_made(self, memory: str, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(ShardError, match=r"data.init_args.staging.directory='.*file/folder' cannot hold"):
            Staging(str(tmp_path / "file" / "folder")).path(f"{memory}/train-0.tar", 100)

    def test_a_full_disk(self, memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        attempts = []

        def full(self, *arguments, **options) -> None:
            attempts.append(1)
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(fsspec.get_filesystem_class("memory"), "get_file", full)
        with pytest.raises(ShardError, match=r"staging.directory=.*No space left.*set limit_gigabytes"):
            Staging(str(tmp_path)).path(f"{memory}/train-0.tar", 100)
        assert len(attempts) == 1

    @pytest.mark.parametrize("directory", ["", "s3://bucket"])
    def test_the_folder_must_be_local(self, directory: str) -> None:
        with pytest.raises(ValueError, match=r"data\.init_args\.staging\.directory="):
            Staging(directory)


class TestLimit:
    """Copies have 100 bytes, and there is room for two and a half."""

    def use(self, staging: Staging, memory: str, number: int) -> Path:
        """Return a copy after marking it as last used in the second of its number."""
        path = Path(staging.path(f"{memory}/train-{number}.tar", 100))
        assert path.read_bytes() == bytes([number]) * 100
        os.utime(path, (number, number))
        return path

    def test_the_least_recently_used_goes(self, memory: str, tmp_path: Path) -> None:
        (tmp_path / "of-somebody-else").write_bytes(bytes(1000))
        staging = Staging(str(tmp_path), 250e-9)
        first, second = (self.use(staging, memory, number) for number in (0, 1))
        staging.path(f"{memory}/train-0.tar", 100)  # used again
        opened = second.open("rb")
        third = self.use(staging, memory, 2)
        assert files(tmp_path) == sorted([first.name, third.name, "of-somebody-else"])
        with opened:
            assert opened.read() == bytes([1]) * 100
        fourth = self.use(staging, memory, 3)
        assert files(tmp_path) == sorted([first.name, fourth.name, "of-somebody-else"])

    def test_one_shard_is_too_large(self, memory: str, tmp_path: Path) -> None:
        with pytest.raises(ShardError, match=r"data.init_args.staging.limit_gigabytes=9.9e-08 is less than memory"):
            Staging(str(tmp_path), 99e-9).path(f"{memory}/train-0.tar", 100)

    def test_the_dead_leave_nothing_and_the_living_are_counted(self, memory: str, tmp_path: Path) -> None:
        staging = Staging(str(tmp_path), 250e-9)
        name = local_name(f"{memory}/train-0.tar")
        for number, size in enumerate((100, 200)):
            (tmp_path / f".{local_name(f'{memory}/train-{number}.tar')}.{size}.partial").write_bytes(b"half")
        kept = self.use(staging, memory, 2)
        assert files(tmp_path) == [kept.name]

        partial = tmp_path / f".{name}.200.partial"
        finished = threading.Event()
        with _locked(tmp_path / f".{name}.lock"):
            partial.touch()
            thread = threading.Thread(target=lambda: (self.use(staging, memory, 3), finished.set()))
            thread.start()
            assert not finished.wait(0.2)  # 200 of 250 bytes are being downloaded by another process
            partial.unlink()
            thread.join(5)
        assert files(tmp_path) == [local_name(f"{memory}/train-3.tar")]


def read_all(folder: str, urls: list[str], limit: float | None, results) -> None:
    staging = Staging(folder, limit)
    for url in urls:
        with staging.open(url, SIZE) as file:
            results.put(file.read() == SHARD)


class TestProcesses:
    """Data loader workers are forked, several to a node."""

    @pytest.mark.parametrize(("limit", "requests"), [(None, 4), (SIZE * 2.5e-9, None)])
    def test_four_processes_share_downloads(self, server: Server, tmp_path: Path, limit, requests) -> None:
        urls = [f"{server.url}/train-{number}.tar" for number in range(4)]
        results = FORK.Queue()
        orders = [urls[turn:] + urls[:turn] if limit else urls for turn in range(4)]
        processes = [FORK.Process(target=read_all, args=(str(tmp_path), order, limit, results)) for order in orders]
        for process in processes:
            process.start()
        assert [results.get(timeout=10) for _ in range(16)] == [True] * 16
        for process in processes:
            process.join(5)
        assert [process.exitcode for process in processes] == [0] * 4
        assert requests is None or server.requests == {"GET": requests}
        assert len(files(tmp_path)) == (2 if limit else 4)

    def test_a_forked_process_downloads_after_its_parent_did(self, server: Server, tmp_path: Path) -> None:
        urls = [f"{server.url}/train-{number}.tar" for number in range(3)]
        assert sizes(urls) == [SIZE] * 3
        staging = Staging(str(tmp_path))
        staging.path(urls[0], SIZE)
        system = fsspec.filesystem("http")  # as a checkpoint on remote storage would use it: with a thread that stays
        assert system.size(urls[0]) == SIZE
        assert in_forked_process(staging.path, urls[1], SIZE) == str(tmp_path / local_name(urls[1]))
        assert in_forked_process(sizes, urls) == [SIZE] * 3
        assert staging.path(urls[2], SIZE) == str(tmp_path / local_name(urls[2]))
        assert system.size(urls[0]) == SIZE

    def test_nothing_is_left_running(self, server: Server) -> None:
        before = threading.active_count(), len(os.listdir("/proc/self/fd"))
        sizes([f"{server.url}/train-0.tar"])
        names = {thread.name for thread in threading.enumerate()}
        assert len(os.listdir("/proc/self/fd")) <= before[1] + 1  # the server's end of the connection may close later
        assert not any(name.startswith("asyncio") for name in names)

    def test_a_process_killed_while_downloading_blocks_nobody(self, server: Server, tmp_path: Path) -> None:
        url = f"{server.url}/train-0.tar"
        server.stalls = True
        process = FORK.Process(target=Staging(str(tmp_path)).path, args=(url, SIZE))
        process.start()
        while not [name for name in files(tmp_path) if name.endswith(".partial")]:
            assert process.is_alive()
        process.kill()
        process.join()
        assert len(files(tmp_path)) == 1
        server.stalls = False
        assert Path(Staging(str(tmp_path)).path(url, SIZE)).read_bytes() == SHARD
        assert files(tmp_path) == [local_name(url)]
