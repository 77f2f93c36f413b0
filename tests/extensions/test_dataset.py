"""A dataset from another file is one class path: it trains, resumes with the next sample, and counts broken images."""

import json
from pathlib import Path

import pytest
import torch

from main import MAETokCLI
from tests.extensions.dataset import FolderIndex, ImageFolders
from tests.support.helpers import run
from tests.support.shards import encoded

BROKEN = Path("train") / "7" / "07.png"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Ten images for training, of which one is broken, and four for validation."""
    for split, count in (("train", 10), ("validation", 4)):
        for number in range(count):
            path = tmp_path / "images" / split / str(number) / f"{number:02d}.png"
            path.parent.mkdir(parents=True)
            path.write_bytes(encoded((32, 32), seed=number))
    (tmp_path / "images" / BROKEN).write_bytes(b"not an image")
    return tmp_path / "images"


def fit(root: Path, folder: Path, steps: int, *arguments: str) -> MAETokCLI:
    data = ["--data=tests.extensions.dataset.ImageFolders", f"--data.root={root}", "--data.image_size=64"]
    options = ["--data.batch_size=4", "--data.num_classes=10", "--data.max_fault_rate=0.5", "--data.seed=3"]
    loading = "--data.loading.num_workers=0"
    return run(
        "fit", "digits_tokenizer", folder, root, *data, *options, loading, f"--trainer.max_steps={steps}", *arguments
    )


def seen(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Record the samples of each training batch."""
    batches: list[list[int]] = []
    handed_over = ImageFolders.on_before_batch_transfer

    def record(self: ImageFolders, batch: dict, dataloader_idx: int) -> dict:
        if self.trainer.training:
            batches.append(batch["indices"].tolist())
        return handed_over(self, batch, dataloader_idx)

    monkeypatch.setattr(ImageFolders, "on_before_batch_transfer", record)
    return batches


def test_it_trains_and_resumes_with_the_next_sample(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = seen(monkeypatch)
    whole = fit(root, tmp_path / "whole", 4)
    assert isinstance(whole.datamodule, ImageFolders)
    expected = batches.copy()
    read = [index for batch in expected for index in batch]
    assert len(read) == 16
    assert 7 not in read  # another sample replaces the broken one
    batches.clear()
    fit(root, tmp_path / "parts", 2)
    resumed = fit(root, tmp_path / "parts", 4, "--ckpt_path=last")
    assert batches == expected
    assert resumed.datamodule.position == 16
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_broken_images_are_counted_and_listed(root: Path, tmp_path: Path) -> None:
    data = fit(root, tmp_path / "run", 3).datamodule
    listed = [json.loads(line) for line in (tmp_path / "run" / "data_faults.jsonl").read_text().splitlines()]
    assert [(fault["shard"], fault["key"], fault["reason"]) for fault in listed] == [("7", "07.png", "corrupt_image")]
    assert data.faults.totals["corrupt_image"] >= 1
    assert sum(data.faults.totals.values()) == data.faults.totals["corrupt_image"]


def test_other_data_cannot_resume(root: Path, tmp_path: Path) -> None:
    fit(root, tmp_path / "run", 2)
    (root / "train" / "3" / "03.png").unlink()
    with pytest.raises(RuntimeError, match="cannot continue the data order: samples was 10 in the checkpoint"):
        fit(root, tmp_path / "run", 3, "--ckpt_path=last")
    assert len(FolderIndex(root / "train")) == 9
