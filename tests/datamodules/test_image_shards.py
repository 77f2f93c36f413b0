"""Packing, reading back, and what happens to shards that are not as they should be."""

import hashlib
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules import Digits, ImageShards
from datamodules.digits import digit_images
from datamodules.pack import main as pack
from datamodules.shards import ShardError, ShardIndex
from datamodules.transforms import center_crop, decode, random_crop


def encoded(size: tuple[int, int] = (8, 8), form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)).save(buffer, form)
    return buffer.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def module(folder: Path, **options) -> ImageShards:
    defaults = {"image_size": 8, "num_classes": 10, "batch_size": 2, "num_workers": 0}
    data = ImageShards(f"{folder}/train-*.tar", f"{folder}/validation-*.tar", **(defaults | options))
    data.setup("fit")
    return data


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    for name in ("cat", "dog", "eel"):
        (tmp_path / "source" / name).mkdir(parents=True)
        for number, (form, extension) in enumerate([("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp")]):
            (tmp_path / "source" / name / f"{number}.{extension}").write_bytes(encoded((12, 16), form))
    return tmp_path / "source"


class TestDigits:
    """The embedded data set."""

    def test_split_is_fixed_complete_and_disjoint(self, digits_root: Path) -> None:
        data = Digits(str(digits_root), num_workers=0)
        data.setup("fit")
        assert {split: len(index) for split, index in data.indices.items()} == {"train": 4000, "validation": 1000}
        images, labels = digit_images()
        assert np.bincount(labels).tolist() == [500] * 10
        stored = data.val_dataloader().dataset.__getitems__(next(iter(data.val_dataloader().batch_sampler)))
        assert torch.equal(stored["images"][:, 0], torch.from_numpy(images[4000:4064]))
        assert torch.equal(stored["images"][:, 0], stored["images"][:, 2])
        assert stored["labels"].tolist() == labels[4000:4064].tolist()

    def test_packing_again_gives_the_same_bytes(self, digits_root: Path, tmp_path: Path) -> None:
        pack(["--source", "digits", "--output", str(tmp_path)])
        names = sorted(path.name for path in digits_root.glob("*.tar"))
        assert names == sorted(path.name for path in tmp_path.glob("*.tar"))
        assert len(names) == 5
        for name in names:
            digests = {hashlib.sha256((folder / name).read_bytes()).digest() for folder in (digits_root, tmp_path)}
            assert len(digests) == 1

    def test_packs_itself_on_first_use_only(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[Path] = []
        monkeypatch.setattr("datamodules.pack.pack_digits", calls.append)
        Digits(str(tmp_path)).prepare_data()
        (tmp_path / "validation-000000.tar").touch()
        Digits(str(tmp_path)).prepare_data()
        assert calls == [tmp_path]


class TestPacking:
    """An image folder becomes shards that hold the same bytes."""

    def test_bytes_labels_and_class_names(self, image_folder: Path, tmp_path: Path) -> None:
        for split in ("train", "validation"):
            options = ["--split", split, "--samples-per-shard", "4"]
            pack(["--source", str(image_folder), "--output", str(tmp_path / "out"), *options])
        data = module(tmp_path / "out", image_size=(12, 16))
        index = data.indices["train"]
        assert len(index.paths) == 3
        assert sorted(index.label) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        stored = {hashlib.sha256(index.read(number)).digest() for number in range(9)}
        assert stored == {hashlib.sha256(path.read_bytes()).digest() for path in image_folder.rglob("*.*")}
        assert (tmp_path / "out" / "classes.json").read_text().split('"')[1::2] == ["cat", "dog", "eel"]
        assert sum(len(batch["labels"]) for batch in data.val_dataloader()) == 10  # nine and one of padding

    def test_splits_must_have_the_same_classes(self, image_folder: Path, tmp_path: Path) -> None:
        pack(["--source", str(image_folder), "--output", str(tmp_path / "out")])
        (image_folder / "cat").rename(tmp_path / "elsewhere")
        with pytest.raises(ValueError, match="labels would not mean the same"):
            pack(["--source", str(image_folder), "--output", str(tmp_path / "out"), "--split", "validation"])

    def test_nothing_to_pack_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="no images"):
            pack(["--source", str(tmp_path / "missing"), "--output", str(tmp_path / "out")])

    def test_a_broken_source_leaves_no_shards(self, image_folder: Path, tmp_path: Path, monkeypatch) -> None:
        monkeypatch.setattr(Path, "read_bytes", lambda self: (_ for _ in ()).throw(OSError("disk gone")))
        with pytest.raises(OSError, match="disk gone"):
            pack(["--source", str(image_folder), "--output", str(tmp_path / "out")])
        assert not list((tmp_path / "out").glob("*.tar"))


class TestReading:
    """Batches keep their contract."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        for split in ("train", "validation"):
            members = []
            for number in range(5):
                members += [(f"a{number}.png", encoded((8 + number, 20))), (f"a{number}.cls", str(number).encode())]
            write_tar(tmp_path / f"{split}-0.tar", members)
        return tmp_path

    def test_evaluation_batches(self, folder: Path) -> None:
        batches = list(module(folder).val_dataloader())
        assert [batch["indices"].tolist() for batch in batches] == [[0, 1], [2, 3], [4, -1]]
        assert batches[-1]["valid"].tolist() == [True, False]
        assert batches[0]["images"].dtype == torch.uint8
        assert batches[0]["images"].shape == (2, 3, 8, 8)
        assert [batch["labels"].tolist() for batch in batches] == [[0, 1], [2, 3], [4, 0]]

    def test_images_become_floats_in_range_after_the_transfer(self, folder: Path) -> None:
        data = module(folder)
        batch = next(iter(data.val_dataloader()))
        converted = data.on_after_batch_transfer(batch, 0)
        assert converted["images"].dtype == torch.float32
        torch.testing.assert_close(converted["images"], batch["images"].float() / 127.5 - 1)
        assert batch["images"].dtype == torch.uint8

    @pytest.mark.parametrize("workers", [0, 2])
    def test_training_continues_at_the_saved_position_with_the_same_pixels(self, folder: Path, workers: int) -> None:
        options = {"random_crop_scale": (0.5, 1.0), "horizontal_flip": True, "image_size": 6}
        loader = iter(module(folder, **options).train_dataloader())
        uninterrupted = [next(loader) for _ in range(8)]
        saved = module(folder, **options)
        saved.position = int(uninterrupted[3]["position"])
        continued = module(folder, num_workers=workers, **options)
        continued.load_state_dict(saved.state_dict())
        loader = iter(continued.train_dataloader())
        for expected in uninterrupted[4:]:
            batch = next(loader)
            assert all(torch.equal(batch[key], expected[key]) for key in expected)

    def test_augmentation_differs_between_epochs(self, folder: Path) -> None:
        loader = iter(module(folder, batch_size=5, random_crop_scale=(0.3, 0.9), image_size=6).train_dataloader())
        first, second = next(loader), next(loader)
        by_index = [dict(zip(batch["indices"].tolist(), batch["images"], strict=True)) for batch in (first, second)]
        assert all(not torch.equal(by_index[0][index], by_index[1][index]) for index in range(5))

    def test_other_data_or_seed_is_refused_on_resume(self, folder: Path) -> None:
        state = module(folder).state_dict()
        with pytest.raises(ShardError, match="seed was 0 in the checkpoint and is 1 now"):
            module(folder, seed=1).load_state_dict(state)


class TestFaults:
    """Nothing is lost silently: a fault names the shard and the sample."""

    GOOD = (("a.png", encoded()), ("a.cls", b"3"))

    @pytest.mark.parametrize(
        ("members", "message"),
        [
            ((("a.png", encoded()),), "sample 'a' has no label"),
            ((("a.cls", b"1"),), "sample 'a' has no image"),
            ((("a.png", b""), ("a.cls", b"1")), "sample 'a' has no image .* or an empty one"),
            ((("a.png", encoded()), ("a.cls", b"cat")), "label b'cat', expected an integer"),
            ((("a.png", encoded()), ("a.cls", b"10")), r"label 10, outside 0 \.\.\. 9"),
            ((*GOOD, GOOD[0]), r"member 'a\.png' occurs twice"),
        ],
    )
    def test_samples(self, tmp_path: Path, members, message: str) -> None:
        path = write_tar(tmp_path / "x.tar", list(members))
        with pytest.raises(ShardError, match=message):
            ShardIndex.build([str(path)], num_classes=10)

    @pytest.mark.parametrize("keep", [100, 512 + 40, 1024, 2048])
    def test_truncated_files(self, tmp_path: Path, keep: int) -> None:
        path = write_tar(tmp_path / "x.tar", list(self.GOOD))
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(ShardError, match=r"x\.tar"):
            ShardIndex.build([str(path)], num_classes=10)

    def test_missing_shards_name_key_value_and_remedy(self, tmp_path: Path) -> None:
        with pytest.raises(ShardError, match=r"data\.init_args\.train_shards='.*train-\*\.tar' matches no file.*pack"):
            module(tmp_path)

    def test_undecodable_image_names_its_place(self, tmp_path: Path) -> None:
        for split in ("train", "validation"):
            write_tar(tmp_path / f"{split}-0.tar", [("a.png", b"not an image"), ("a.cls", b"1")])
        with pytest.raises(ShardError, match=r"sample 0 \(validation-0\.tar, byte 512\) cannot be decoded"):
            next(iter(module(tmp_path).val_dataloader()))

    def test_shortened_shard_is_noticed_when_read(self, tmp_path: Path) -> None:
        path = write_tar(tmp_path / "x.tar", list(self.GOOD))
        index = ShardIndex.build([str(path)], num_classes=10)
        path.write_bytes(path.read_bytes()[:600])
        with pytest.raises(ShardError, match="was the shard replaced"):
            index.read(0)


def test_sixteen_bit_images_keep_their_brightness() -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.array([[0, 32768, 65535]], dtype=np.uint16)).save(buffer, "PNG")
    assert decode(buffer.getvalue())[0].tolist() == [[0, 128, 255]]


def test_crop_scale_must_be_a_range_of_shares() -> None:
    with pytest.raises(ValueError, match=r"data\.init_args\.random_crop_scale=\(0\.8, 1\.2\)"):
        ImageShards("a", "b", random_crop_scale=(0.8, 1.2))


def test_seed_everything_is_the_default_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    assert ImageShards("a", "b").seed == 7
    assert ImageShards("a", "b", seed=3).seed == 3


def test_center_crop_keeps_the_middle_and_the_aspect() -> None:
    image = torch.zeros(3, 20, 40, dtype=torch.uint8)
    image[:, :, 10:30] = 255
    assert center_crop(image, (20, 20)).min() == 255
    assert center_crop(image, (10, 10)).shape == (3, 10, 10)
    assert center_crop(image, (30, 20)).shape == (3, 30, 20)
    assert center_crop(image, (20, 40)).equal(image)


def test_random_crop_covers_the_wanted_share() -> None:
    ramp = torch.arange(64, dtype=torch.uint8).expand(3, 64, 64).contiguous()
    for seed in range(20):
        crop = random_crop(ramp, (32, 32), (0.8, 1.0), np.random.default_rng(seed))
        covered = (int(crop[0, 0, -1]) - int(crop[0, 0, 0])) / 63
        assert 0.75 <= covered <= 1.0
