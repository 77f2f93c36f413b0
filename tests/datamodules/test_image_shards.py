"""Batches of images: the contract, evaluation, augmentation, broken samples."""

from pathlib import Path

import numpy as np
import pytest
import torch

from datamodules import ImageShards
from datamodules.order import BatchReference
from datamodules.shards import ShardError
from tests.support.shards import encoded, image_shards, write_shards, write_tar


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split in ("train", "validation"):
        members = []
        for number in range(5):
            members += [(f"a{number}.png", encoded((8 + number, 20))), (f"a{number}.cls", str(number).encode())]
        write_tar(tmp_path / f"{split}-0.tar", members)
    return tmp_path


def damaged(folder: Path, broken: set[int], count: int = 12) -> Path:
    """Write both splits with ``count`` samples, some of which are not images."""
    for split in ("train", "validation"):
        members = []
        for number in range(count):
            image = b"not an image" if number in broken else encoded(seed=number)
            members += [(f"{number}.png", image), (f"{number}.cls", b"%d" % (number % 10))]
        write_tar(folder / f"{split}-0.tar", members)
    return folder


def test_evaluation_batches(folder: Path) -> None:
    batches = list(image_shards(folder).val_dataloader())
    assert [batch["indices"].tolist() for batch in batches] == [[0, 1], [2, 3], [4, -1]]
    assert [batch["labels"].tolist() for batch in batches] == [[0, 1], [2, 3], [4, 0]]
    assert batches[-1]["valid"].tolist() == [True, False]
    assert batches[0]["images"].dtype == torch.uint8
    assert batches[0]["images"].shape == (2, 3, 8, 8)
    assert not batches[-1]["images"][1].any()


def test_images_become_floats_in_range_after_the_transfer(folder: Path) -> None:
    data = image_shards(folder)
    batch = next(iter(data.val_dataloader()))
    converted = data.on_after_batch_transfer(batch, 0)
    assert converted["images"].dtype == torch.float32
    torch.testing.assert_close(converted["images"], batch["images"].float() / 127.5 - 1)
    assert batch["images"].dtype == torch.uint8


def test_augmentation_differs_between_epochs(folder: Path) -> None:
    data = image_shards(folder, batch_size=5, random_crop_scale=(0.3, 0.9), image_size=6)
    loader = iter(data.train_dataloader())
    first, second = next(loader), next(loader)
    by_index = [dict(zip(batch["indices"].tolist(), batch["images"], strict=True)) for batch in (first, second)]
    assert all(not torch.equal(by_index[0][index], by_index[1][index]) for index in range(5))


def test_half_of_the_images_are_mirrored(folder: Path) -> None:
    dataset = image_shards(folder, image_size=8).dataset("train", training=True)
    plain = image_shards(folder, image_size=8, horizontal_flip=False).dataset("train", training=True)
    zeros = np.zeros(1000, dtype=np.int64)
    reference = BatchReference(zeros, np.arange(1000), 0)
    original = plain.__getitems__(BatchReference(zeros[:1], zeros[:1], 0))["images"][0]
    images = dataset.__getitems__(reference)["images"]
    mirrored = sum(torch.equal(image, original.flip(-1)) for image in images)
    assert mirrored + sum(torch.equal(image, original) for image in images) == 1000
    assert abs(mirrored - 500) < 64  # four standard deviations


def test_shardwise_prediction_skips_finished_shards(tmp_path: Path) -> None:
    write_shards(tmp_path, [3, 2, 4])
    write_shards(tmp_path, [2], split="validation")
    data = image_shards(tmp_path, batch_size=2)
    data.finished_shards["train"] = {1}
    train, validation = data.predict_dataloader()
    assert [batch["indices"].tolist() for batch in train] == [[0, 1], [2, -1], [5, 6], [7, 8]]
    assert [batch["indices"].tolist() for batch in validation] == [[0, 1]]


class TestBrokenImages:
    """An image that cannot be decoded is replaced in training and left out of evaluation; both report it."""

    def test_evaluation_marks_them(self, tmp_path: Path) -> None:
        data = image_shards(damaged(tmp_path, {1, 2}), batch_size=4)
        batch = next(iter(data.val_dataloader()))
        assert batch["indices"].tolist() == [0, -1, -1, 3]
        assert batch["labels"].tolist() == [0, 0, 0, 3]
        assert batch["valid"].tolist() == [True, False, False, True]
        described = [(fault.shard, fault.key, fault.reason) for fault in batch["faults"]]
        assert described == [("validation-0.tar", "1", "corrupt_image"), ("validation-0.tar", "2", "corrupt_image")]
        assert batch["faults"][0].detail == "no known image format; begins with b'not an i'"

    @pytest.mark.parametrize("workers", [0, 2])
    def test_training_replaces_them_by_the_same_others_every_time(self, tmp_path: Path, workers: int) -> None:
        options = {"batch_size": 6, "random_crop_scale": (0.5, 1.0), "image_size": 6}
        whole = [
            batch
            for _, batch in zip(
                range(4), image_shards(damaged(tmp_path, {1, 2}), **options).train_dataloader(), strict=False
            )
        ]
        for batch in whole:
            assert batch["valid"].all()
            assert not set(batch["indices"].tolist()) & {1, 2}
            assert torch.equal(batch["labels"], batch["indices"] % 10)
        assert sum(len(batch["faults"]) for batch in whole) >= 4  # two epochs, and replacements may be broken as well
        again = image_shards(tmp_path, workers=workers, **options)
        again.position = 6
        for expected, batch in zip(whole[1:], again.train_dataloader(), strict=False):
            assert torch.equal(expected["images"], batch["images"])
            assert expected["indices"].tolist() == batch["indices"].tolist()
            assert expected["faults"] == batch["faults"]

    def test_unreadable_shards_count_as_well(self, tmp_path: Path) -> None:
        data = image_shards(damaged(tmp_path, set()), batch_size=4)
        path = tmp_path / "validation-0.tar"
        path.write_bytes(path.read_bytes()[:2100])
        batches = list(data.val_dataloader())
        assert [fault.reason for batch in batches for fault in batch["faults"]] == ["unreadable"] * 11
        assert batches[0]["faults"][0].key.startswith("byte ")

    def test_nothing_but_broken_images_stops(self, tmp_path: Path) -> None:
        data = image_shards(damaged(tmp_path, set(range(12))))
        with pytest.raises(ShardError, match=r"21 samples in a row cannot be read, the last: .*corrupt_image"):
            next(iter(data.train_dataloader()))


def test_crop_scale_must_be_a_range_of_shares() -> None:
    with pytest.raises(ValueError, match=r"data\.init_args\.random_crop_scale=\(0\.8, 1\.2\)"):
        ImageShards("a", "b", random_crop_scale=(0.8, 1.2))


def test_seed_everything_is_the_default_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    assert ImageShards("a", "b").seed == 7
    assert ImageShards("a", "b", seed=3).seed == 3
