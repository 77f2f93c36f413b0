"""Wrong shards are an error before any training, and single broken samples are counted."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from datamodules import ImageShards
from datamodules.faults import TooManyFaultsError
from datamodules.index_file import IndexFile
from datamodules.pack.__main__ import main as pack
from datamodules.shard_index import ShardIndex
from datamodules.shards import OpenFiles, ShardError, ShardRecord
from tests.support.shards import Member, encoded, image_shards, write_shards, write_tar

GOOD: list[Member] = [("good.png", encoded()), ("good.cls", b"3")]


def load(folder: Path, max_fault_rate: float = 0.0, pattern: str = "*.tar", num_classes: int = 10) -> ShardIndex:
    return ShardIndex.load(f"{folder}/{pattern}", "data.init_args.train_shards", num_classes, max_fault_rate)


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """Five shards of four samples with their index."""
    write_shards(tmp_path / "source", [20])
    options = ["--samples-per-shard=4", "--jobs=0", "--output", str(tmp_path / "packed")]
    pack(["--source", f"{tmp_path}/source/*.tar", *options])
    return tmp_path / "packed"


class TestBrokenSamples:
    """One broken sample among good ones is left out and described; the run continues only if the rate allows it."""

    @pytest.mark.parametrize(
        ("members", "reason", "detail"),
        [
            ([("a.png", encoded())], "missing_label", "no member cls"),
            ([("a.cls", b"1")], "missing_image", "members are cls"),
            ([("a.json", b"{}"), ("a.cls", b"1")], "missing_image", "members are json, cls"),
            ([("a.png", b""), ("a.cls", b"1")], "empty_image", "a.png"),
            ([("a.png", encoded()), ("a.cls", b"cat")], "label_not_integer", "b'cat'"),
            ([("a.png", encoded()), ("a.cls", b"99999999999999999999")], "label_not_integer", "b'9999"),
            ([("a.png", encoded()), ("a.cls", b"")], "label_not_integer", "b''"),
            (
                [("a.png", encoded()), ("a.cls", b"10")],
                "label_out_of_range",
                "label 10, but labels must lie in 0 ... 9",
            ),
            ([("a.png", encoded()), ("a.cls", b"-1")], "label_out_of_range", "label -1"),
            ([("a.png", encoded()), ("a.cls", b"1"), ("a.png", encoded(seed=1))], "duplicate_key", "the same name"),
        ],
    )
    def test_in_a_walked_shard(self, tmp_path: Path, members: list[Member], reason: str, detail: str) -> None:
        path = write_tar(tmp_path / "x.tar", [*members, *GOOD])
        with pytest.raises(
            TooManyFaultsError, match=rf"1 of 2 samples are broken \({reason} 1\), more than max_fault_rate"
        ):
            load(tmp_path)
        index = load(tmp_path, max_fault_rate=0.5)
        assert (len(index), index.label.tolist()) == (1, [3])
        assert index.read(0) == encoded()
        (fault,) = index.faults
        assert (fault.shard, fault.key, fault.reason) == (path.name, "a", reason)
        assert detail in fault.detail

    def test_a_key_that_an_earlier_shard_has(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "x.tar", GOOD)
        write_tar(
            tmp_path / "y.tar", [("good.png", encoded(seed=5)), ("good.cls", b"3"), *[("b" + n, d) for n, d in GOOD]]
        )
        write_tar(tmp_path / "z.tar", [*[("c" + name, data) for name, data in GOOD], *GOOD])
        index = load(tmp_path, max_fault_rate=0.5)
        assert [(fault.shard, fault.key, fault.reason) for fault in index.faults] == [
            ("y.tar", "good", "duplicate_key"),
            ("z.tar", "good", "duplicate_key"),
        ]
        assert index.shard.tolist() == [0, 1, 2]

    def test_label_out_of_range_in_an_indexed_shard(self, packed: Path) -> None:
        index = load(packed, max_fault_rate=0.2, num_classes=9)
        assert [fault.reason for fault in index.faults] == ["label_out_of_range"] * 2
        assert all(fault.key.endswith(("0018", "0019")) for fault in index.faults)
        assert len(index) == 18
        assert index.label.max() == 8

    def test_members_need_not_be_neighbours_and_hidden_ones_do_not_count(self, tmp_path: Path) -> None:
        first, second = encoded(seed=1), encoded(seed=2)
        order = [("d/a.png", first), ("._a.png", b"?"), ("b.PNG", second), ("b.cls", b"2"), ("d/a.cls", b"1\n")]
        write_tar(tmp_path / "x.tar", order)
        index = load(tmp_path)
        assert [index.read(number) for number in range(2)] == [first, second]
        assert index.label.tolist() == [1, 2]
        assert index.keys(np.arange(2)) == ["d/a", "b"]


class TestBrokenShards:
    """A shard that is broken as a whole is an error that names the shard and the remedy."""

    def test_truncated_inside_a_member(self, tmp_path: Path) -> None:
        path = write_tar(tmp_path / "x.tar", GOOD)
        path.write_bytes(path.read_bytes()[:600])
        with pytest.raises(ShardError, match=r"x\.tar cannot be read as a tar file \(unexpected end of data\)"):
            load(tmp_path)

    def test_cut_between_members(self, tmp_path: Path) -> None:
        path = write_tar(tmp_path / "x.tar", GOOD)
        path.write_bytes(path.read_bytes()[:2048])
        with pytest.raises(ShardError, match=r"x\.tar is truncated or damaged after byte 2048"):
            load(tmp_path)

    def test_a_damaged_header_in_the_middle(self, tmp_path: Path) -> None:
        path = write_tar(tmp_path / "x.tar", [*GOOD, ("b.png", encoded()), ("b.cls", b"1")])
        data = bytearray(path.read_bytes())
        data[2048:2060] = b"x" * 12
        path.write_bytes(data)
        with pytest.raises(ShardError, match=r"x\.tar is truncated or damaged after byte 2048"):
            load(tmp_path)

    @pytest.mark.parametrize("content", [b"", b"not a tar file" * 100])
    def test_no_tar_at_all(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "x.tar").write_bytes(content)
        with pytest.raises(ShardError, match=r"x\.tar cannot be read as a tar file"):
            load(tmp_path)

    def test_nothing_matches(self, tmp_path: Path) -> None:
        with pytest.raises(ShardError, match=r"data\.init_args\.train_shards='.*' matches no file\. Write shards with"):
            load(tmp_path)

    def test_a_named_shard_is_missing(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "x0.tar", GOOD)
        with pytest.raises(ShardError, match=r"1 shards are listed but missing, the first is .*x1\.tar"):
            load(tmp_path, pattern="x{0..1}.tar")
        write_tar(tmp_path / "x1.tar", [("b" + name, data) for name, data in GOOD])
        assert len(load(tmp_path, pattern="x{0..1}.tar")) == 2

    def test_shortened_while_in_use(self, tmp_path: Path) -> None:
        path = write_tar(tmp_path / "x.tar", GOOD)
        index = load(tmp_path)
        path.write_bytes(path.read_bytes()[:600])
        with pytest.raises(ShardError, match="was the shard replaced"):
            index.read(0)


class TestIndexFile:
    """``index.json`` replaces the walk and is checked against the shards."""

    def test_index_and_walk_agree(self, packed: Path) -> None:
        by_index = load(packed)
        (packed / "index.json").unlink()
        walked = load(packed)
        assert by_index.fingerprint() == walked.fingerprint()
        assert by_index.paths == walked.paths
        assert by_index.shard_samples == walked.shard_samples == [4] * 5

    def test_shards_are_not_walked_when_there_is_an_index(self, packed: Path, monkeypatch) -> None:
        monkeypatch.setattr(ShardRecord, "walk", lambda *_: pytest.fail("walked"))
        assert len(load(packed)) == 20

    def test_a_listed_shard_is_missing(self, packed: Path) -> None:
        (packed / "train-000002.tar").unlink()
        with pytest.raises(ShardError, match=r"1 shards are listed but missing, the first is .*train-000002\.tar"):
            load(packed)

    def test_all_listed_shards_are_missing(self, packed: Path) -> None:
        for path in packed.glob("*.tar"):
            path.unlink()
        with pytest.raises(ShardError, match="5 shards are listed but missing"):
            load(packed)

    def test_a_shard_that_is_not_listed(self, packed: Path) -> None:
        write_tar(packed / "train-000009.tar", GOOD)
        with pytest.raises(ShardError, match=r"there but not listed in index\.json, the first is .*train-000009\.tar"):
            load(packed)

    def test_a_shard_of_other_size(self, packed: Path) -> None:
        with (packed / "train-000001.tar").open("ab") as file:
            file.write(bytes(512))
        with pytest.raises(ShardError, match=r"train-000001\.tar has \d+ bytes, but its index says \d+: pack it again"):
            load(packed)

    def test_another_shard_of_the_same_size(self, packed: Path) -> None:
        path = packed / "train-000001.tar"
        size = path.stat().st_size
        write_tar(path, [("a.cls", b"1"), ("a.png", encoded())])
        path.write_bytes(path.read_bytes().ljust(size, b"\0"))
        with pytest.raises(ShardError, match=r"train-000001\.tar does not hold what its index says at byte"):
            load(packed)

    def test_the_same_shard_twice(self, packed: Path) -> None:
        index = IndexFile.read(packed)
        copy = "train-000007.tar"
        (packed / copy).write_bytes((packed / "train-000000.tar").read_bytes())
        index.records[copy] = ShardRecord(**{**vars(index.records["train-000000.tar"]), "path": copy})
        index.write(packed)
        with pytest.raises(ShardError, match=r"train-000007\.tar has the same content as .*train-000000\.tar"):
            load(packed)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda contents: contents.pop("shards"), "is not an index of shards"),
            (lambda contents: contents["shards"][0]["labels"].pop(), "must have 4 entries each"),
            (lambda contents: contents.update(schema_version=99), "has schema version 99, this suite reads 1"),
        ],
    )
    def test_damaged_index(self, packed: Path, change, message: str) -> None:
        path = packed / "index.json"
        contents = json.loads(path.read_text())
        change(contents)
        path.write_text(json.dumps(contents))
        with pytest.raises(ShardError, match=message):
            load(packed)
        path.write_text("{")
        with pytest.raises(ShardError, match=r"index\.json is not an index of shards \(JSONDecodeError"):
            load(packed)

    def test_a_pattern_may_mean_a_part_and_the_folders_may_be_several(self, packed: Path, tmp_path: Path) -> None:
        assert len(load(packed, pattern="train-00000[01].tar")) == 8
        write_shards(tmp_path / "others", [3])
        assert len(load(tmp_path, pattern="{packed,others}/*.tar")) == 23

    def test_pax_headers_are_understood(self, tmp_path: Path) -> None:
        write_shards(tmp_path / "pax", [3])
        for path in (tmp_path / "pax").glob("*.tar"):
            with tarfile.open(path) as archive:
                members = [(info.name, archive.extractfile(info).read()) for info in archive]
            with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
                for name, data in members:
                    info = tarfile.TarInfo("long/" * 40 + name)
                    info.size, info.mtime = len(data), 1.5
                    archive.addfile(info, io.BytesIO(data))
        index = load(tmp_path / "pax")
        assert len(index) == 3
        assert index.read(2) == encoded((10, 12), seed=2)


def test_splits_of_other_classes_are_refused(tmp_path: Path) -> None:
    for split, classes in (("train", "ab"), ("validation", "ac")):
        for name in classes:
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "0.png").write_bytes(encoded(seed=ord(name)))
        pack(["--source", str(tmp_path / split), "--output", f"{tmp_path}/{split}s", "--split", split, "--jobs=0"])
    data = ImageShards(f"{tmp_path}/trains/*.tar", f"{tmp_path}/validations/*.tar", num_classes=2)
    with pytest.raises(ShardError, match="name different classes"):
        data.setup("fit")


def test_out_of_range_is_an_error_before_training(tmp_path: Path) -> None:
    write_shards(tmp_path, [20])
    write_shards(tmp_path, [5], split="validation")
    with pytest.raises(
        TooManyFaultsError, match=r"(?s)data\.init_args\.train_shards=.* 10 of 20 .*wrong num_classes\?"
    ):
        image_shards(tmp_path, num_classes=5)


def test_open_files_are_limited_and_deleted_ones_are_let_go(tmp_path: Path) -> None:
    paths = [tmp_path / str(number) for number in range(4)]
    for path in paths:
        path.touch()
    files = OpenFiles(limit=3)
    opened = [files.keep(str(path), path.open("rb", buffering=0)) for path in paths[:3]]
    assert files["0"] is None
    assert files[str(paths[0])] is opened[0]  # becomes the most recently used
    files.keep(str(paths[3]), paths[3].open("rb", buffering=0))
    assert [file.closed for file in opened] == [False, True, False]
    paths[2].unlink()
    files.close_deleted()
    assert [file.closed for file in opened] == [False, True, True]
