"""Throughput on a clock that the test sets: images, waiting, FLOPs and memory of training without validation."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import Dataset

from callbacks import Throughput
from datamodules.sharded import BatchLoader, identity
from maetok.runtime.memory import peak_memory
from tests.support.fakes import Task
from tests.support.helpers import curves, run, weights

BATCH, WIDTH = 3, 8
FIRST = 2 * BATCH * WIDTH * WIDTH * 2  # of a layer forward and backward, whose input has no gradient
LATER = 2 * BATCH * WIDTH * WIDTH * 3  # of one whose input has


class Clock:
    """Stands still until it is told how much time something has taken."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        for module in ("callbacks.reporting.throughput", "datamodules.sharded"):
            monkeypatch.setattr(f"{module}.time", SimpleNamespace(perf_counter=lambda: self.now))


class SlowData(Dataset):
    """Batches that take so many seconds, one after the other."""

    def __init__(self, clock: Clock, seconds: list[float]) -> None:
        self.clock, self.seconds = clock, seconds

    def __getitems__(self, indices: list[int]) -> dict[str, Any]:
        self.clock.now += self.seconds[indices[0]]
        return {"images": np.ones((BATCH, WIDTH), dtype=np.float32), "labels": np.zeros(BATCH, dtype=np.int64)}


class Batches:
    """An order of batches without a length, as that of training is."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Any:
        return iter([index] for index in range(self.count))


class TwoKinds(LightningModule):
    """Steps take 2 seconds on the clock; from the third on they have a second layer, and FLOPs of their own."""

    def __init__(self, clock: Clock, compiled: bool = False) -> None:
        super().__init__()
        self.clock, self.compile_blocks = clock, compiled
        self.layers = torch.nn.ModuleList(torch.nn.Linear(WIDTH, WIDTH) for _ in range(2))

    @property
    def step_kind(self) -> str:
        return "two layers" if self.global_step >= 2 else "one layer"

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.clock.now += 2.0
        layers = self.layers if self.step_kind == "two layers" else self.layers[:1]
        hidden = batch["images"]
        for layer in layers:
            hidden = layer(hidden)
        return hidden.square().mean()

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        self.clock.now += 1000.0

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Failing(TwoKinds):
    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        raise RuntimeError("broken")


class Recorded(Callback):
    """Keeps what was logged in each step, and takes 0.5 seconds after it, as a checkpoint may."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.steps = clock, []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.steps.append({name: float(value) for name, value in trainer.callback_metrics.items()})
        self.clock.now += 0.5


def fit(clock: Clock, callback: Throughput, model: TwoKinds, **options: Any) -> list[dict[str, float]]:
    """Four steps; the loader takes 50 seconds for the first batch, then 3, 1, 5, 7 seconds."""
    data = SlowData(clock, [50.0, 3.0, 1.0, 5.0, 7.0])
    loader = BatchLoader(data, batch_sampler=Batches(5), collate_fn=identity)  # type: ignore[arg-type]
    recorded = Recorded(clock)
    trainer = Trainer(
        accelerator="cpu", devices=1, max_steps=4, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[callback, recorded],
        num_sanity_val_steps=0, check_val_every_n_epoch=None, **options,
    )  # fmt: skip
    validation = BatchLoader(SlowData(clock, [400.0]), batch_sampler=Batches(1), collate_fn=identity)  # type: ignore[arg-type]
    trainer.fit(model, loader, validation)
    return recorded.steps


def test_share_of_waiting_speed_and_utilisation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning fetches a batch ahead: 50 and 3 seconds pass before step 1 starts, 1 before step 2, then 5 and 7."""
    clock = Clock(monkeypatch)
    steps = fit(clock, Throughput(peak_flops_per_second=1000.0), TwoKinds(clock), log_every_n_steps=2)
    seconds = [2 + 0.5 + 1 + 2, 0.5 + 5 + 2 + 0.5 + 7 + 2]
    waited, flops = [1, 5 + 7], [2 * FIRST, 2 * (FIRST + LATER)]
    assert "throughput/data_wait_share" not in steps[0]
    for interval in (0, 1):
        logged, duration = steps[2 * interval + 1], seconds[interval]
        assert logged["throughput/images_per_second"] == pytest.approx(2 * BATCH / duration)
        assert logged["throughput/data_wait_share"] == pytest.approx(waited[interval] / duration)
        assert logged["throughput/model_flops_per_second"] == pytest.approx(flops[interval] / duration)
        assert logged["throughput/model_flops_utilization"] == pytest.approx(flops[interval] / duration / 1000)


def test_validation_and_the_batch_after_it_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    steps = fit(clock, Throughput(1000.0), TwoKinds(clock), log_every_n_steps=4, val_check_interval=2)
    seconds = (2 + 0.5 + 1 + 2) + (2 + 0.5 + 7 + 2)  # 5 seconds for a batch fall between
    assert steps[3]["throughput/images_per_second"] == pytest.approx(4 * BATCH / seconds)
    assert steps[3]["throughput/data_wait_share"] == pytest.approx((1 + 7) / seconds)


def test_nothing_is_logged_where_lightning_logs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    assert fit(clock, Throughput(1000.0), TwoKinds(clock), log_every_n_steps=0) == [{}] * 4


def test_compiled_steps_are_not_counted_but_can_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    steps = fit(clock, Throughput(1000.0), TwoKinds(clock, compiled=True), log_every_n_steps=4)
    assert "throughput/images_per_second" in steps[3]
    assert not {name for name in steps[3] if "flops" in name}
    given = Throughput(1000.0, model_flops_per_image=7.0)
    steps = fit(clock, given, TwoKinds(clock, compiled=True), log_every_n_steps=4)
    rate = 7 * steps[3]["throughput/images_per_second"]
    assert steps[3]["throughput/model_flops_per_second"] == pytest.approx(rate)
    assert steps[3]["throughput/model_flops_utilization"] == pytest.approx(rate / 1000)


def test_images_of_all_processes_and_peak_memory_of_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, task, callback = Clock(monkeypatch), Task(), Throughput(1.0, 2.0)
    trainer = SimpleNamespace(world_size=4, log_every_n_steps=1, train_dataloader=None)
    held = torch.ones(2**26)  # 256 MiB
    before = peak_memory(task.device)
    callback.on_train_batch_start(trainer, task, {}, 0)
    clock.now += 8
    callback.on_train_batch_end(trainer, task, None, {"labels": torch.zeros(5)}, 0)
    assert task.logged["throughput/images_per_second"] == 5 * 4 / 8
    assert task.logged["throughput/model_flops_per_second"] == 5 * 2 / 8
    assert "throughput/data_wait_share" not in task.logged  # this loader does not say
    assert before is not None
    assert before / 2**30 <= task.logged["throughput/memory_gib"] <= before / 2**30 + 0.125
    assert before > held.nbytes


def test_a_step_that_fails_leaves_no_counter_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, callback = Clock(monkeypatch), Throughput(1.0)
    with pytest.raises(RuntimeError, match="broken"):
        fit(clock, callback, Failing(clock))
    assert callback.counter is None
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


def test_training_is_the_same_with_and_without_the_callback(tmp_path: Path, digits_root: Path) -> None:
    """Bit for bit, with checkpointed activations and a discriminator that plays in the second step."""
    checkpointing = "--model.init_args.activation_checkpointing=true"
    with_it = run("fit", "imagenet256_maetok_b128", tmp_path / "with", digits_root, checkpointing)
    counted = next(it for it in with_it.trainer.callbacks if isinstance(it, Throughput)).flops_per_image
    assert list(counted) == ["without discriminator", "with discriminator"]
    assert 0 < counted["without discriminator"] < counted["with discriminator"]
    only_checkpoints = (
        "--trainer.callbacks=[{class_path: callbacks.ResumableCheckpoint, init_args: {every_n_steps: 1}}]"
    )
    run("fit", "imagenet256_maetok_b128", tmp_path / "without", digits_root, checkpointing, only_checkpoints)
    one, other = weights(tmp_path / "with", 2), weights(tmp_path / "without", 2)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    shown = curves(tmp_path / "with")
    rate = [value for _, value in shown["throughput/images_per_second"]]
    found = [value for _, value in shown["throughput/model_flops_per_second"]]
    assert found == pytest.approx([rate[0] * counted["without discriminator"], rate[1] * counted["with discriminator"]])
    assert all(0 <= share < 1 for _, share in shown["throughput/data_wait_share"])
