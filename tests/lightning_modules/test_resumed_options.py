"""A continued run takes its optimizer options from its config, not from the checkpoint."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from callbacks import ResumableCheckpoint
from callbacks.resilience.checkpointing import resolve_checkpoint
from lightning_modules import CosineWithWarmup
from lightning_modules.optimization import Optimization
from tests.support.strategies.runs import build, fit


def optimization(rate: float, **options: Any) -> Optimization:
    schedule = partial(CosineWithWarmup, warmup_steps=2, final_ratio=0.1)
    return Optimization(partial(torch.optim.AdamW, lr=rate, **options), schedule)


def options(rate: float, **more: Any) -> dict[str, Optimization]:
    return {name: optimization(rate, **more) for name in ("autoencoder_optimization", "discriminator_optimization")}


class LearningRates(Callback):
    """Records the options of both optimizers in each micro-batch."""

    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        self.seen.append([optimizer.param_groups[0]["lr"] for optimizer in trainer.optimizers])


def test_the_config_says_how_optimizers_go_on(tmp_path: Path, digits_root: Path) -> None:
    first, whole, parts = tmp_path / "first", tmp_path / "whole", tmp_path / "parts"
    fit(build(1, **options(1e-2)), first, digits_root, "single", 1, 6, ResumableCheckpoint(3, keep_last=-1))
    path = str(first / "checkpoints" / "step=000000003.ckpt")
    expected, found = LearningRates(), LearningRates()
    fit(build(1, **options(1e-4)), whole, digits_root, "single", 1, 6, expected)
    task = build(1, **options(1e-4, weight_decay=0.5, betas=(0.5, 0.7)))
    trainer = fit(task, parts, digits_root, "single", 1, 6, found, ckpt_path=path)
    assert len(found.seen) == 6  # micro-batches of three steps
    for rates, others in zip(found.seen, expected.seen[6:], strict=True):
        assert rates == pytest.approx(others, rel=1e-12)
    for optimizer, steps in zip(trainer.optimizers, (6, 5), strict=True):  # the discriminator starts a step later
        assert optimizer.param_groups[0]["weight_decay"] == 0.5
        assert optimizer.param_groups[0]["betas"] == (0.5, 0.7)
        assert {int(state["step"]) for state in optimizer.state.values()} == {steps}  # restored states


def test_a_learning_rate_of_zero_stops_all_change(tmp_path: Path, digits_root: Path) -> None:
    fit(build(3, "SGD", 0.02), tmp_path, digits_root, "single", 1, 2, ResumableCheckpoint(2))
    path = resolve_checkpoint("last", tmp_path, "fit")
    task = build(3, "SGD", 0.0)
    fit(task, tmp_path / "more", digits_root, "single", 1, 4, ckpt_path=path)
    stored = torch.load(path)["state_dict"]
    assert all(torch.equal(value, stored[f"denoiser.{name}"]) for name, value in task.denoiser.state_dict().items())
    resumed = build(3, "SGD", 0.02)
    fit(resumed, tmp_path / "others", digits_root, "single", 1, 4, ckpt_path=path)
    assert not torch.equal(resumed.denoiser.input.weight, stored["denoiser.input.weight"])
