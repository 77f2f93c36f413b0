"""Remote files: patterns, sizes, contents, and errors when they cannot be read."""

import asyncio
import socket

import fsspec
import pytest

from datamodules.remote import check_location, expand, is_remote, read_bytes, sizes
from datamodules.shards import ShardError
from tests.datamodules.conftest import SHARD, Server

SIZE = len(SHARD)


class TestLocations:
    """Impossible locations are refused before anything is read."""

    @pytest.mark.parametrize("location", ["http://host/a.tar", "s3://bucket/a.tar", "memory://a", "file:///tmp/a.tar"])
    def test_urls_are_remote(self, location: str) -> None:
        assert is_remote(location)

    @pytest.mark.parametrize("location", ["/data/a.tar", "data/a-*.tar", "C:/data", "pipe:curl http://host/a.tar", ""])
    def test_paths_are_not(self, location: str) -> None:
        assert not is_remote(location)

    def test_what_can_be_read_passes(self) -> None:
        for location in ("/data/train-*.tar", "https://host/a.tar", "memory://a.tar"):
            check_location(location, "data.init_args.train_shards")

    @pytest.mark.parametrize(
        ("location", "remedy"),
        [
            ("pipe:curl -s http://host/a.tar", "would run a shell command; give the URL itself"),
            ("nonsense://host/a.tar", "knows no protocol 'nonsense'; use https://, s3://"),
            ("simplecache::http://host/a.tar", "knows no protocol"),
        ],
    )
    def test_others_do_not(self, location: str, remedy: str) -> None:
        with pytest.raises(ShardError, match=f"data.init_args.train_shards='{location[:8]}.*{remedy}"):
            check_location(location, "data.init_args.train_shards")

    @pytest.mark.parametrize(("protocol", "remedy"), [("s3", r"pip install '\.\[s3\]'"), ("gs", "gcsfs")])
    def test_a_missing_package_is_named(self, protocol: str, remedy: str, monkeypatch: pytest.MonkeyPatch) -> None:
        def missing(protocol: str) -> type:
            raise ImportError("Please install gcsfs")

        monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
        with pytest.raises(ShardError, match=f"KEY='{protocol}://bucket/a.tar'.*{remedy}"):
            check_location(f"{protocol}://bucket/a.tar", "KEY")


class TestExpand:
    """Patterns become lists of URLs."""

    def test_braces_need_no_server(self) -> None:
        urls = expand("http://127.0.0.1:9/{b,a}-{000008..000010}.tar", "KEY")
        assert urls == [f"http://127.0.0.1:9/{name}-{number:06d}.tar" for name in "ab" for number in (8, 9, 10)]

    def test_a_url_is_itself(self) -> None:
        for url in ("http://host/a.tar?signature=x", "http://[::1]:80/a.tar", "memory://folder/a.tar"):
            assert expand(url, "KEY") == [url]

    def test_wildcards_list_files_only(self, memory: str) -> None:
        fsspec.filesystem("memory").pipe("/staging/train-9.tar/inside", b"")
        expected = [f"{memory}/train-{number}.tar" for number in range(4)]
        assert expand(f"{memory}/train-*.tar", "KEY") == expected
        assert expand(f"{memory}/{{train,trai?}}-?.tar", "KEY") == expected
        assert expand(f"{memory}/train-[12].tar", "KEY") == expected[1:3]

    def test_errors_name_key_value_and_remedy(self, memory: str) -> None:
        with pytest.raises(ShardError, match=r"KEY='http://host/a-\*.tar': .*use braces like .*index.json"):
            expand("http://host/a-*.tar", "KEY")
        with pytest.raises(
            ShardError, match=r"KEY='memory://staging/\{train,x\}\*': memory://staging/x\* matches no file"
        ):
            expand(f"{memory}/{{train,x}}*", "KEY")
        with pytest.raises(ShardError, match=r"KEY='http://host/\{0..3.tar': .*write braces like"):
            expand("http://host/{0..3.tar", "KEY")


class TestMetadata:
    """Sizes and small files."""

    def test_sizes_in_order_without_reading(self, server: Server, memory: str) -> None:
        server.files["/empty.tar"] = b""
        urls = [f"{server.url}/train-1.tar", f"{memory}/train-2.tar", f"{server.url}/empty.tar"]
        assert sizes(urls) == [SIZE, 100, 0]
        assert server.requests == {"HEAD": 2}
        assert sizes([]) == []

    def test_missing_shards_are_counted_and_listed(self, server: Server, memory: str) -> None:
        urls = [f"{server.url}/train-{number}.tar" for number in range(20)] + [f"{memory}/none.tar", f"{memory}/"]
        with pytest.raises(ShardError) as caught:
            sizes(urls)
        lines = str(caught.value).splitlines()
        assert lines[0].startswith("18 of 22 shards")
        assert lines[1].startswith(f"  {server.url}/train-4.tar (ClientResponseError: 404")
        assert lines[11] == "  and 8 more"
        assert len(lines) == 12

    def test_a_server_that_is_busy_is_asked_again(self, server: Server) -> None:
        server.failures = 4  # each attempt sends HEAD and then GET
        assert sizes([f"{server.url}/train-0.tar"]) == [SIZE]
        assert server.failures == 0

    def test_a_size_must_be_told(self, server: Server) -> None:
        server.tells_size = False
        with pytest.raises(ShardError, match="does not tell the size"):
            sizes([f"{server.url}/train-0.tar"])

    def test_nobody_listens(self, quick: None) -> None:
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{closed.getsockname()[1]}/a.tar"
        with pytest.raises(ShardError, match=f"{url}.*ClientConnectorError"):
            sizes([url])
        with pytest.raises(ShardError, match=f"{url} cannot be read"):
            read_bytes(url)

    def test_small_files(self, server: Server, memory: str) -> None:
        assert read_bytes(f"{server.url}/train-0.tar") == SHARD
        assert read_bytes(f"{server.url}/index.json") is None
        assert read_bytes(f"{memory}/train-3.tar") == bytes([3]) * 100
        assert read_bytes(f"{memory}/index.json") is None
        server.failures, server.status = 1, 403
        with pytest.raises(ShardError, match=r"index.json cannot be read .*403"):
            read_bytes(f"{server.url}/index.json")

    def test_works_where_an_event_loop_runs(self, server: Server) -> None:
        async def notebook() -> list[int]:
            return sizes([f"{server.url}/train-0.tar"])

        assert asyncio.run(notebook()) == [SIZE]
