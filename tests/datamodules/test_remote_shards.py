"""Shards on a server give the batches of the same shards on disk, and faults of the server are errors."""

from itertools import islice
from pathlib import Path

import pytest
import torch

from datamodules import ImageShards, Loading, Staging
from datamodules.pack.__main__ import main as pack
from datamodules.shards import ShardError
from tests.datamodules.conftest import Server
from tests.support.shards import image_shards, write_shards


@pytest.fixture
def packed(tmp_path: Path, server: Server) -> Path:
    """Six shards of four samples with an index, on disk and on the server."""
    write_shards(tmp_path / "source", [20])
    write_shards(tmp_path / "others", [4])
    for source, split in (("source", "train"), ("others", "validation")):
        options = ["--split", split, "--samples-per-shard=4", "--jobs=0", "--output", str(tmp_path / "packed")]
        pack(["--source", f"{tmp_path}/{source}/*.tar", *options])
    server.files = {f"/data/{path.name}": path.read_bytes() for path in (tmp_path / "packed").iterdir()}
    return tmp_path / "packed"


def remote_shards(
    server: Server, tmp_path: Path, train: str = "train-*.tar", workers: int = 0, **options
) -> ImageShards:
    defaults = {
        "image_size": 8,
        "num_classes": 10,
        "batch_size": 6,
        "loading": Loading(num_workers=workers),
        "staging": Staging(str(tmp_path / "stage")),
    }
    urls = [f"{server.url}/data/{name}" for name in (train, "validation-000000.tar")]
    data = ImageShards(*urls, **(defaults | options))
    data.setup("fit")
    return data


def copies(tmp_path: Path) -> list[str]:
    return sorted(path.name[17:] for path in (tmp_path / "stage").iterdir() if not path.name.startswith("."))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("pattern", ["train-*.tar", "train-{000000..000004}.tar"])
def test_batches_are_those_of_the_shards_on_disk(
    packed: Path, server: Server, tmp_path: Path, pattern: str, workers: int
) -> None:
    data = remote_shards(server, tmp_path, pattern, workers)
    assert not (tmp_path / "stage").exists()  # the index was enough to begin with
    local = image_shards(packed, batch_size=6)
    assert data.state_dict() == local.state_dict()
    for expected, batch in zip(islice(local.train_dataloader(), 8), data.train_dataloader(), strict=False):
        assert all(torch.equal(expected[name], batch[name]) for name in ("images", "labels", "indices"))
        assert batch["faults"] == []
    assert copies(tmp_path) == [f"train-{number:06d}.tar" for number in range(5)]
    assert server.requests["GET"] == 7  # index.json of each split, and every training shard once
    data.setup("fit")


def test_without_index_the_shards_are_staged_and_walked(packed: Path, server: Server, tmp_path: Path) -> None:
    del server.files["/data/index.json"]
    with pytest.raises(ShardError, match="a web server does not list its files; use braces"):
        remote_shards(server, tmp_path)
    data = remote_shards(server, tmp_path, "train-{000000..000004}.tar")
    assert data.state_dict()["fingerprint"] == image_shards(packed).state_dict()["fingerprint"]
    assert len(copies(tmp_path)) == 6


def test_a_limit_is_kept_with_windowed_shuffling(packed: Path, server: Server, tmp_path: Path) -> None:
    largest = max(path.stat().st_size for path in packed.glob("train-*.tar"))
    staging = Staging(str(tmp_path / "stage"), limit_gigabytes=3.5 * largest / 1e9)
    with pytest.raises(ShardError, match=r"limit_gigabytes=.* cannot hold the shards that are shuffled together"):
        remote_shards(server, tmp_path, staging=staging)
    data = remote_shards(server, tmp_path, staging=staging, shuffle_window=2, batch_size=4)
    local = image_shards(packed, batch_size=4, shuffle_window=2)
    for expected, batch in zip(islice(local.train_dataloader(), 15), data.train_dataloader(), strict=False):
        assert torch.equal(expected["images"], batch["images"])
        assert len(copies(tmp_path)) <= 3


class TestServerFaults:
    """Known problems are errors at the start; later ones are faults that name the shard."""

    def test_listed_but_missing(self, packed: Path, server: Server, tmp_path: Path) -> None:
        del server.files["/data/train-000003.tar"]
        with pytest.raises(ShardError, match=r"1 of 5 shards cannot be read[\s\S]*train-000003\.tar"):
            remote_shards(server, tmp_path)

    def test_another_file_than_the_index_lists(self, packed: Path, server: Server, tmp_path: Path) -> None:
        server.files["/data/train-000003.tar"] += bytes(512)
        with pytest.raises(
            ShardError, match=r"train-000003\.tar \(\d+ bytes\) is not the shard that .*index\.json lists"
        ):
            remote_shards(server, tmp_path)

    def test_server_is_gone_or_knows_nothing(self, packed: Path, server: Server, tmp_path: Path) -> None:
        server.failures = 1000
        with pytest.raises(ShardError, match=r"index\.json cannot be read"):
            remote_shards(server, tmp_path)

    def test_server_fails_later(self, packed: Path, server: Server, tmp_path: Path) -> None:
        data = remote_shards(server, tmp_path)
        server.failures = 1000
        with pytest.raises(ShardError, match=r"samples in a row cannot be read, the last: .*unreadable"):
            next(iter(data.train_dataloader()))

    def test_no_place_to_stage_and_shell_commands(self, packed: Path, server: Server, tmp_path: Path) -> None:
        with pytest.raises(ShardError, match=r"is remote: set data\.init_args\.staging\.directory"):
            remote_shards(server, tmp_path, staging=None)
        data = ImageShards("pipe:cat x.tar", "pipe:cat x.tar")
        with pytest.raises(
            ShardError, match=r"data\.init_args\.train_shards='pipe:cat x\.tar' would run a shell command"
        ):
            data.setup("fit")
