"""Faults in a real run are logged, listed with shard and key, counted over all processes, and stop all of them."""

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.optim import SGD

from datamodules.faults import TooManyFaultsError
from datamodules.shards import ShardError
from tests.support.helpers import run_subprocess
from tests.support.shards import encoded, image_shards, write_shards, write_tar


class Sum(LightningModule):
    """Trains a single weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def training_step(self, batch, batch_idx):
        assert batch["valid"].all()
        return self.weight.sum() * batch["images"].mean()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return SGD(self.parameters(), lr=0.1)


def shards_with_faults(folder: Path, broken_images: int, broken_labels: int, count: int = 40) -> Path:
    members = []
    for number in range(count):
        image = b"not an image" if number < broken_images else encoded(seed=number)
        label = b"cat" if number >= count - broken_labels else b"%d" % (number % 10)
        members += [(f"{number}.png", image), (f"{number}.cls", label)]
    write_tar(folder / "train-0.tar", members)
    write_shards(folder, [6], split="validation")
    return folder


def fit(folder: Path, steps: int, max_fault_rate: float, workers: int = 0) -> Trainer:
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=None,
        val_check_interval=steps,
        log_every_n_steps=2,
        logger=TensorBoardLogger(folder / "run", name="", version=""),
        default_root_dir=folder / "run",
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    data = image_shards(folder, workers, stage=None, batch_size=4, max_fault_rate=max_fault_rate)
    trainer.fit(Sum(), data)
    return trainer


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_logs_counts_and_lists_what_is_broken(tmp_path: Path, workers: int) -> None:
    with pytest.warns(UserWarning, match="2 broken samples of .* are left out"):
        fit(shards_with_faults(tmp_path, 3, 2), steps=40, max_fault_rate=0.25, workers=workers)  # four epochs
    lines = [json.loads(line) for line in (tmp_path / "run" / "data_faults.jsonl").read_text().splitlines()]
    found = sorted((line["shard"], line["key"], line["reason"]) for line in lines)
    corrupt = [("train-0.tar", str(number), "corrupt_image") for number in range(3)]
    labels = [("train-0.tar", str(number), "label_not_integer") for number in (38, 39)]
    assert found == sorted(corrupt + labels)  # each once, though seen in every epoch
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    last = {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"] if tag.startswith("data/")}
    assert last["data/faults_label_not_integer"] == 2
    assert last["data/faults_corrupt_image"] >= 12
    assert last["data/faults"] == last["data/faults_label_not_integer"] + last["data/faults_corrupt_image"]
    assert last["data/epoch"] == pytest.approx(160 / 38)
    assert [event.step for event in events.Scalars("data/faults")][:3] == [2, 4, 6]


def test_too_many_broken_images_stop_the_run(tmp_path: Path) -> None:
    with pytest.raises(
        TooManyFaultsError, match=r"broken samples \(corrupt_image \d+\) in \d+ that were read: more than "
    ):
        fit(shards_with_faults(tmp_path, 9, 0), steps=40, max_fault_rate=0.1)
    assert (tmp_path / "run" / "data_faults.jsonl").read_text().count("corrupt_image") >= 4


def test_few_broken_images_do_not_stop_a_run_that_has_only_begun(tmp_path: Path) -> None:
    """One fault in the first eight samples is more than a tenth of these, but not of the data."""
    trainer = fit(shards_with_faults(tmp_path, 4, 0), steps=12, max_fault_rate=0.15)
    assert trainer.global_step == 12


def test_unusable_labels_are_an_error_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"(?s)data\.init_args\.train_shards=.*5 of 40 samples are broken.*'35'"):
        fit(shards_with_faults(tmp_path, 0, 5), steps=2, max_fault_rate=0.1)


def test_validation_alone_reports_as_well(tmp_path: Path) -> None:
    shards_with_faults(tmp_path, 0, 0)
    members = [("a.png", b"no"), ("a.cls", b"1"), ("b.png", encoded()), ("b.cls", b"1")]
    write_tar(tmp_path / "validation-9.tar", members)
    data = image_shards(tmp_path, stage=None, max_fault_rate=0.2)
    trainer = Trainer(accelerator="cpu", default_root_dir=tmp_path, logger=False, enable_progress_bar=False)
    trainer.validate(Sum(), data, verbose=False)
    (line,) = [json.loads(line) for line in (tmp_path / "data_faults.jsonl").read_text().splitlines()]
    assert (line["shard"], line["key"], line["reason"]) == ("validation-9.tar", "a", "corrupt_image")
    assert data.faults.total_samples == 8
    data = image_shards(tmp_path, stage=None, max_fault_rate=0.1)
    with pytest.raises(TooManyFaultsError, match="1 broken samples"):
        trainer.validate(Sum(), data, verbose=False)


# Two processes, of which only one meets broken samples: both have to stop, at the same step.
PROGRAM = """
import sys
from pathlib import Path
from lightning.pytorch import Trainer
from datamodules.faults import TooManyFaultsError
from datamodules.images import ImageDataset
from tests.datamodules.test_faults import Sum
from tests.support.shards import image_shards

folder = Path(sys.argv[1])
read = ImageDataset.image
trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", max_steps=30, max_epochs=-1, log_every_n_steps=2,
    use_distributed_sampler=False, limit_val_batches=0, logger=False, default_root_dir=folder,
    enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)

def image(self, index, uniform):
    if trainer.global_rank == 1 and index < 8:
        return self.index.fault(index, "corrupt_image", "as a test")
    return read(self, index, uniform)

ImageDataset.image = image
data = image_shards(folder, stage=None, batch_size=4, max_fault_rate=0.05)
try:
    trainer.fit(Sum(), data)
except TooManyFaultsError as error:
    assert data.faults.total_samples >= 4 * trainer.global_step + 4  # of both processes
    (folder / f"stopped.{trainer.global_rank}").write_text(f"{trainer.global_step} {error}")
"""


def test_all_processes_stop_together(tmp_path: Path) -> None:
    shards_with_faults(tmp_path, 0, 0)
    run_subprocess(PROGRAM, tmp_path, str(tmp_path))
    first, second = ((tmp_path / f"stopped.{rank}").read_text() for rank in (0, 1))
    assert first == second
    assert "corrupt_image" in first
    assert (tmp_path / "data_faults.jsonl").read_text().count("as a test") >= 3  # written by the other process
