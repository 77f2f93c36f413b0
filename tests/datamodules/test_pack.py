"""Packing gives the same bytes in parallel, after a kill, and from folders, tar files and digits."""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules import Digits, Loading
from datamodules.faults import TooManyFaultsError
from datamodules.index_file import IndexFile
from datamodules.pack.__main__ import main as pack
from datamodules.pack.digits import digit_images
from datamodules.shards import ShardError, file_sha256
from maetok.formats.pictures import decode
from tests.support.helpers import ROOT
from tests.support.shards import encoded, image_shards, run_pack


def digests(folder: Path) -> dict[str, str]:
    return {path.name: file_sha256(path) for path in sorted(folder.iterdir())}


class TestDigits:
    """The embedded data set."""

    def test_split_is_fixed_complete_and_disjoint(self, digits_root: Path) -> None:
        data = Digits(str(digits_root), loading=Loading(num_workers=0))
        data.setup("fit")
        assert {split: len(index) for split, index in data.indices.items()} == {"train": 4000, "validation": 1000}
        images, labels = digit_images()
        assert np.bincount(labels).tolist() == [500] * 10
        stored = next(iter(data.val_dataloader()))
        assert torch.equal(stored["images"][:, 0], torch.from_numpy(images[4000:4064]))
        assert torch.equal(stored["images"][:, 0], stored["images"][:, 2])
        assert stored["labels"].tolist() == labels[4000:4064].tolist()

    def test_packing_again_gives_the_same_bytes(self, digits_root: Path, tmp_path: Path) -> None:
        pack(["--source", "digits", "--output", str(tmp_path)])
        assert digests(tmp_path) == digests(digits_root)
        assert len(digests(tmp_path)) == 6

    def test_packs_itself_on_first_use_only(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[Path] = []
        monkeypatch.setattr("datamodules.pack.digits.pack_digits", calls.append)
        Digits(str(tmp_path)).prepare_data()
        (tmp_path / "validation-000000.tar").touch()
        Digits(str(tmp_path)).prepare_data()
        assert calls == [tmp_path]


class TestFolders:
    """An image folder becomes shards that hold the same bytes."""

    def test_bytes_labels_class_names_and_index(self, image_folder: Path, tmp_path: Path) -> None:
        for split in ("train", "validation"):
            run_pack(image_folder, tmp_path / "out", "--split", split)
        data = image_shards(tmp_path / "out", image_size=(12, 16))
        index = data.indices["train"]
        assert len(index.paths) == 3
        stored = {hashlib.sha256(index.read(number)).digest(): int(index.label[number]) for number in range(9)}
        classes = {"cat": 0, "dog": 1, "eel": 2}
        files = image_folder.rglob("*.*")
        assert stored == {hashlib.sha256(path.read_bytes()).digest(): classes[path.parent.name] for path in files}
        assert index.class_names == ["cat", "dog", "eel"]
        contents = json.loads((tmp_path / "out" / "index.json").read_text())
        assert contents["schema_version"] == 1
        shards = contents["shards"]
        assert [shard["samples"] for shard in shards] == [4, 4, 1, 4, 4, 1]
        assert contents["totals"] == {"shards": 6, "samples": 18, "bytes": sum(shard["bytes"] for shard in shards)}
        for shard in shards:
            path = tmp_path / "out" / shard["file"]
            assert (shard["bytes"], shard["sha256"]) == (path.stat().st_size, file_sha256(path))

    def test_keys_tell_the_origin_and_differ(self, image_folder: Path, tmp_path: Path) -> None:
        run_pack(image_folder, tmp_path / "out")
        index = image_shards(tmp_path / "out", stage=None).index("train")
        keys = [key for shard in range(3) for key in index.keys(np.flatnonzero(index.shard == shard))]
        assert sorted(key[:8] for key in keys) == [f"{number:08d}" for number in range(9)]
        assert sorted(key[9:] for key in keys) == ["0", "0", "0", "1", "1", "1", "2", "2", "2"]

    def test_parallel_packing_gives_the_same_bytes(self, image_folder: Path, tmp_path: Path) -> None:
        run_pack(image_folder, tmp_path / "alone")
        pack(["--source", str(image_folder), "--output", str(tmp_path / "two"), "--samples-per-shard=4", "--jobs=2"])
        assert digests(tmp_path / "alone") == digests(tmp_path / "two")

    def test_resize_touches_large_images_only(self, tmp_path: Path) -> None:
        folder = tmp_path / "source" / "a"
        folder.mkdir(parents=True)
        small = encoded((20, 40), "JPEG")
        (folder / "small.jpg").write_bytes(small)
        ramp = Image.fromarray(np.linspace(0, 255, 80 * 60).reshape(60, 80).astype(np.uint8)).convert("RGB")
        for name, options in (("large.jpg", {"quality": 95}), ("large.png", {})):
            ramp.save(folder / name, **options)
        run_pack(tmp_path / "source", tmp_path / "out", "--resize", "30")
        index = image_shards(tmp_path / "out", stage=None).index("train")
        images = [index.read(number) for number in range(3)]
        assert small in images
        expected = np.asarray(ramp.resize((40, 30), Image.Resampling.BICUBIC), dtype=float)
        for data in images:
            if data != small:
                image = decode(data)
                assert image.shape == (3, 30, 40)
                assert np.abs(image.permute(1, 2, 0).numpy() - expected).max() <= (3 if data[:2] == b"\xff\xd8" else 0)

    def test_splits_must_have_the_same_classes(self, image_folder: Path, tmp_path: Path) -> None:
        run_pack(image_folder, tmp_path / "out")
        (image_folder / "cat").rename(tmp_path / "elsewhere")
        with pytest.raises(ShardError, match="labels would not mean the same"):
            run_pack(image_folder, tmp_path / "out", "--split", "validation")

    def test_nothing_to_pack_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="no images"):
            run_pack(tmp_path / "missing", tmp_path / "out")
        with pytest.raises(FileNotFoundError, match="matches no tar file"):
            run_pack(f"{tmp_path}/*.tar", tmp_path / "out")

    def test_packing_twice_does_nothing_and_other_input_is_refused(
        self, image_folder: Path, tmp_path: Path, capsys
    ) -> None:
        run_pack(image_folder, tmp_path / "out")
        before = digests(tmp_path / "out")
        run_pack(image_folder, tmp_path / "out")
        assert "nothing to do" in capsys.readouterr().out
        (image_folder / "cat" / "0.png").unlink()
        with pytest.raises(ShardError, match="--overwrite to replace them"):
            run_pack(image_folder, tmp_path / "out")
        assert {name: digest for name, digest in digests(tmp_path / "out").items() if name in before} == before
        run_pack(image_folder, tmp_path / "out", "--overwrite")
        assert sum(len(record) for record in IndexFile.read(tmp_path / "out").records.values()) == 8
        run_pack(image_folder, tmp_path / "out", "--overwrite", "--samples-per-shard", "8")
        assert sorted(path.name for path in (tmp_path / "out").glob("*.tar")) == ["train-000000.tar"]


class TestFaults:
    """Broken sources are left out and listed; too many are an error."""

    def test_broken_samples_are_listed_and_left_out(self, image_folder: Path, tmp_path: Path) -> None:
        (image_folder / "cat" / "broken.jpg").write_bytes(encoded((12, 16), "JPEG")[:200])
        (image_folder / "dog" / "empty.png").touch()
        with pytest.raises(TooManyFaultsError, match=r"2 of 11 samples are broken \(empty_image 1, corrupt_image 1\)"):
            run_pack(image_folder, tmp_path / "out")
        assert not list((tmp_path / "out").glob("*.tar"))
        hidden = tmp_path / "out" / ".train.partial"
        written = {path.name: path.stat().st_ino for path in hidden.glob("*.tar")}
        run_pack(image_folder, tmp_path / "out", "--max-fault-rate", "0.2")  # nothing has to be written again
        assert {path.name: path.stat().st_ino for path in (tmp_path / "out").glob("*.tar")} == written
        index = IndexFile.read(tmp_path / "out")
        assert sum(len(record) for record in index.records.values()) == 9
        assert index.packings["train"]["faults"] == {"corrupt_image": 1, "empty_image": 1}
        lines = [json.loads(line) for line in (tmp_path / "out" / "train_faults.jsonl").read_text().splitlines()]
        assert [(line["shard"], line["reason"]) for line in lines] == [
            ("dog/empty.png", "empty_image"),
            ("cat/broken.jpg", "corrupt_image"),
        ]

    def test_a_failing_disk_leaves_no_shards(self, image_folder: Path, tmp_path: Path, monkeypatch) -> None:
        monkeypatch.setattr(
            "datamodules.pack.sources.SourceSample.read", lambda self: (_ for _ in ()).throw(OSError("gone"))
        )
        with pytest.raises(TooManyFaultsError, match="unreadable 9"):
            run_pack(image_folder, tmp_path / "out")
        assert not list((tmp_path / "out").glob("*.tar"))


class TestKill:
    """Complete shards are kept, half-written ones are written again, and the result is the same."""

    SLOW = (
        "import sys, time; from datamodules.pack import __main__ as pack, sources as s; "
        "read = s.SourceSample.read; "
        "s.SourceSample.read = lambda self: (time.sleep(0.05), read(self))[1]; pack.main(sys.argv[1:])"
    )

    def test_a_killed_packing_goes_on(self, image_folder: Path, tmp_path: Path) -> None:
        for name in ("cat", "dog"):
            for number in range(60):
                (image_folder / name / f"more{number}.png").write_bytes(encoded((12, 16), seed=number))
        run_pack(image_folder, tmp_path / "whole")
        arguments = ["--source", str(image_folder), "--output", str(tmp_path / "out"), "--samples-per-shard=4"]
        process = subprocess.Popen(
            [sys.executable, "-c", self.SLOW, *arguments, "--jobs=2"], cwd=ROOT, start_new_session=True
        )
        hidden = tmp_path / "out" / ".train.partial"
        deadline = time.monotonic() + 120
        while len(list(hidden.glob("*.tar"))) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)  # the parent only: its workers have to notice
        process.wait()
        finished = {path.name: path.stat().st_mtime_ns for path in hidden.glob("*.tar")}
        assert 4 <= len(finished) < 33
        assert not list((tmp_path / "out").glob("*.tar"))
        pack([*arguments, "--jobs=0"])
        assert digests(tmp_path / "out") == digests(tmp_path / "whole")
        kept = [name for name, time_ns in finished.items() if (tmp_path / "out" / name).stat().st_mtime_ns == time_ns]
        assert len(kept) == len(finished)

    def test_a_kill_while_shards_get_their_names(self, image_folder: Path, tmp_path: Path, monkeypatch) -> None:
        run_pack(image_folder, tmp_path / "whole")
        replace = os.replace

        def fail_on_the_second(source: Path, target: Path) -> None:
            if Path(target) == tmp_path / "out" / "train-000001.tar":
                raise KeyboardInterrupt
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", fail_on_the_second)
            with pytest.raises(KeyboardInterrupt):
                run_pack(image_folder, tmp_path / "out")
        with pytest.raises(ShardError, match="2 shards are listed but missing"):  # nobody trains on a part
            image_shards(tmp_path / "out", stage=None).index("train")
        run_pack(image_folder, tmp_path / "out")
        assert digests(tmp_path / "out") == digests(tmp_path / "whole")

    def test_a_kill_while_old_shards_are_replaced(self, image_folder: Path, tmp_path: Path, monkeypatch) -> None:
        run_pack(image_folder, tmp_path / "out")
        (image_folder / "cat" / "0.png").unlink()
        run_pack(image_folder, tmp_path / "whole")
        with monkeypatch.context() as patch:
            patch.setattr("datamodules.pack.split.shutil.rmtree", lambda _: None)
            patch.setattr("datamodules.pack.split.publish", lambda partial, path: None)
            run_pack(image_folder, tmp_path / "out", "--overwrite")
        with pytest.raises(ShardError, match="its index says"):
            image_shards(tmp_path / "out", stage=None).index("train")
        run_pack(image_folder, tmp_path / "out")
        assert digests(tmp_path / "out") == digests(tmp_path / "whole")

    def test_splits_of_similar_names_do_not_touch_each_other(self, image_folder: Path, tmp_path: Path) -> None:
        run_pack(image_folder, tmp_path / "out", "--split", "train-extra")
        before = digests(tmp_path / "out")
        run_pack(image_folder, tmp_path / "out", "--split", "train")
        run_pack(image_folder, tmp_path / "out", "--split", "train", "--samples-per-shard=2", "--overwrite")
        after = digests(tmp_path / "out")
        assert all(after[name] == digest for name, digest in before.items() if name != "index.json")
        assert len(IndexFile.read(tmp_path / "out").records) == 3 + 5


def test_sixteen_bit_and_transparent_sources_are_copied_unchanged(tmp_path: Path) -> None:
    folder = tmp_path / "source" / "a"
    folder.mkdir(parents=True)
    Image.fromarray(np.full((8, 8), 40000, dtype=np.uint16)).save(folder / "deep.png")
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(folder / "clear.png")
    run_pack(tmp_path / "source", tmp_path / "out")
    index = image_shards(tmp_path / "out", stage=None).index("train")
    stored = {index.read(0), index.read(1)}
    assert stored == {(folder / name).read_bytes() for name in ("deep.png", "clear.png")}
    assert {int(decode(data)[0, 0, 0]) for data in stored} == {40000 >> 8, 255}
    assert Image.open(io.BytesIO(min(stored, key=len))).size == (8, 8)
