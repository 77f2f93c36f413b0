"""Any number of processes and workers reads the same samples and pixels, and resumes where a run was killed."""

import hashlib
import json
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from datamodules import ImageShards
from datamodules.shards import ShardError
from maetok.formats.pictures import decode
from tests.support.helpers import run_subprocess
from tests.support.shards import image_shards, write_shards

AUGMENTED = {"random_crop_scale": (0.5, 1.0), "horizontal_flip": True, "image_size": 6, "batch_size": 6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, [7, 5, 8])
    write_shards(folder, [4, 3], split="validation")
    return folder


def process(data: ImageShards, rank: int, world_size: int) -> ImageShards:
    """Return the datamodule of one of several processes."""
    data.trainer = SimpleNamespace(global_rank=rank, world_size=world_size)
    return data


def global_batches(folder: Path, world_size: int, workers: int, batches: int, position: int = 0) -> list[tuple]:
    """Return (index, image) of the samples of each global batch, merged from all processes."""
    loaders = []
    for rank in range(world_size):
        data = process(image_shards(folder, workers, **AUGMENTED), rank, world_size)
        data.position = position
        loaders.append(list(islice(data.train_dataloader(), batches)))
    merged = []
    for parts in zip(*loaders, strict=True):
        batch = [None] * AUGMENTED["batch_size"]
        for rank, part in enumerate(parts):
            images = [hashlib.md5(image.numpy().tobytes()).hexdigest() for image in part["images"]]
            batch[rank::world_size] = list(zip(part["indices"].tolist(), images, strict=True))
        merged.append(tuple(batch))
    return merged


@pytest.fixture(scope="module")
def uninterrupted(folder: Path) -> list[tuple]:
    return global_batches(folder, 1, 0, batches=10)


@pytest.mark.parametrize("workers", [0, 1, 4])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_coverage_is_exact(folder: Path, uninterrupted: list[tuple], world_size: int, workers: int) -> None:
    batches = global_batches(folder, world_size, workers, batches=10)
    assert batches == uninterrupted  # samples and pixels
    indices = [index for batch in batches for index, _ in batch]
    for epoch in range(3):
        assert sorted(indices[20 * epoch : 20 * epoch + 20]) == list(range(20))
    evaluated = []
    for rank in range(world_size):
        data = process(image_shards(folder, workers, **AUGMENTED), rank, world_size)
        evaluated += [index for batch in data.val_dataloader() for index in batch["indices"].tolist()]
    assert sorted(index for index in evaluated if index >= 0) == list(range(7))
    assert len(evaluated) == 12


@pytest.mark.parametrize("workers", [0, 1, 4])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_elastic_restart_in_the_middle_of_an_epoch(
    folder: Path, uninterrupted: list[tuple], world_size: int, workers: int
) -> None:
    assert global_batches(folder, world_size, workers, batches=6, position=24) == uninterrupted[4:]


def test_skipping_does_not_decode(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    monkeypatch.setattr("maetok.formats.pictures.decode", lambda data: decoded.append(data) or decode(data))
    data = image_shards(folder, **AUGMENTED)
    data.position = 6_000_000_006
    batch = next(iter(data.train_dataloader()))
    assert len(decoded) == 6
    assert int(batch["position"]) == 6_000_000_012


def test_other_data_or_settings_are_refused_on_resume(folder: Path, tmp_path: Path) -> None:
    state = image_shards(folder).state_dict()
    for options, message in (
        ({"seed": 1}, "seed was 0 in the checkpoint and is 1 now"),
        ({"shuffle_window": 2}, "shuffle_window was None in the checkpoint and is 2 now"),
        ({"drop_tail": True, "batch_size": 6}, "epoch_samples was 20 in the checkpoint and is 18 now"),
    ):
        with pytest.raises(ShardError, match=message):
            image_shards(folder, **options).load_state_dict(state)
    write_shards(tmp_path, [7, 6, 7])
    with pytest.raises(ShardError, match="fingerprint was"):
        image_shards(tmp_path, stage=None).load_state_dict(state)


# A task that writes down what it is given, and a kill in the middle of an epoch.
PROGRAM = """
import hashlib, json, os, sys
from pathlib import Path
import torch
from lightning.pytorch import LightningModule, Trainer
from callbacks import ResumableCheckpoint
from callbacks.resilience.checkpointing import resolve_checkpoint
from datamodules import ImageShards, Loading

shards, run, devices, workers, batch_size, kill_at = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])

class Recorder(LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
    def training_step(self, batch, batch_idx):
        images = (batch["images"] * 127.5 + 127.5).round().to(torch.uint8).contiguous()
        digests = [hashlib.md5(image.numpy().tobytes()).hexdigest() for image in images]
        with open(f"{run}/seen.{self.global_step}.{self.global_rank}.{os.getpid()}", "w") as file:
            json.dump(list(zip(batch["indices"].tolist(), digests)), file)
        if self.global_step + 1 == kill_at:
            os._exit(9)
        return self.weight.sum() * 0
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

data = ImageShards(f"{shards}/train-*.tar", f"{shards}/validation-*.tar", image_size=6, num_classes=10,
    batch_size=batch_size, random_crop_scale=(0.5, 1.0), loading=Loading(num_workers=workers))
trainer = Trainer(accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", max_steps=11,
    max_epochs=-1, use_distributed_sampler=False, limit_val_batches=0, logger=False, default_root_dir=run,
    enable_progress_bar=False, enable_model_summary=False, callbacks=[ResumableCheckpoint(every_n_steps=4)])
trainer.fit(Recorder(), data, ckpt_path=resolve_checkpoint("last", run, "fit"))
"""


@pytest.mark.parametrize(
    ("devices", "workers", "batch_size"), [((1, 1), 0, (6, 6)), ((1, 1), 4, (6, 6)), ((2, 3), 1, (6, 9))]
)
def test_a_killed_run_goes_on_with_the_next_sample(
    folder: Path, tmp_path: Path, devices: tuple[int, int], workers: int, batch_size: tuple[int, int]
) -> None:
    """Kill in step 7, resume from step 4, on as many processes or on three instead of two (with a larger batch)."""
    for run, count, size, kill_at in zip((1, 2), devices, batch_size, (7, -1), strict=True):
        arguments = [str(folder), str(tmp_path), str(count), str(workers), str(size), str(kill_at)]
        run_subprocess(PROGRAM, tmp_path, *arguments, succeeds=run == 2)
        if run == 1:
            before = seen_batches(tmp_path, count)
            for path in tmp_path.glob("seen.*"):
                path.unlink()
    after = seen_batches(tmp_path, devices[1])
    whole = [place for batch in global_batches(folder, 1, 0, batches=30) for place in batch]
    assert sorted(before)[-1] == 6
    for step in range(6):  # the seventh was cut short
        assert before[step] == whole[6 * step : 6 * step + 6]
    assert sorted(after) == list(range(4, 11))
    for step in range(4, 11):
        start = 24 + batch_size[1] * (step - 4)
        assert after[step] == whole[start : start + batch_size[1]]


def seen_batches(run: Path, world_size: int) -> dict[int, list[tuple]]:
    """Return the samples of each step, merged from all processes."""
    parts: dict[int, dict[int, list]] = {}
    for path in run.glob("seen.*"):
        _, step, rank, _ = path.name.split(".")
        parts.setdefault(int(step), {})[int(rank)] = [tuple(place) for place in json.loads(path.read_text() or "[]")]
    merged = {}
    for step, by_rank in parts.items():
        batch = [None] * sum(len(part) for part in by_rank.values())
        for rank, part in by_rank.items():
            batch[rank::world_size] = part
        merged[step] = batch
    return merged


def test_the_position_of_a_checkpoint_ignores_prefetched_batches(folder: Path) -> None:
    data = image_shards(folder, 4, **AUGMENTED)
    data.trainer = SimpleNamespace(
        global_rank=0, world_size=1, training=True, log_every_n_steps=0, state=SimpleNamespace(fn="fit")
    )
    loader = iter(data.train_dataloader())
    for _ in range(3):
        data.on_before_batch_transfer(next(loader), 0)
    assert data.state_dict()["position"] == 18
    assert torch.equal(next(loader)["position"], torch.tensor(24))
    assert data.state_dict()["position"] == 18
