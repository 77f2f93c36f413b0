"""Going back after too many skipped steps: what returns, what goes on, how often, and exact continuation."""

import json
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.utils.data import DataLoader

from callbacks import NonFiniteGuard, ResumableCheckpoint
from callbacks.resilience.checkpointing import resolve_checkpoint
from callbacks.resilience.non_finite_guard import NonFiniteError
from callbacks.resilience.rollback import Rollback
from lightning_modules import CosineWithWarmup
from lightning_modules.optimization import Optimization
from maetok.checkpoints import files as checkpoint_files
from maetok.checkpoints.files import Checkpoint, CheckpointFiles
from maetok.checkpoints.runs import complete_checkpoints, step_of
from tests.support.diffusion import Recorder, diffusion, latent_shards, trainer
from tests.support.helpers import Poison, RecordScalars, States, StopAt, curves, records, scalars
from tests.support.tokenizer_training import Noise, task

ROW = [5, 6, 7]  # steps 6 to 8 are bad


class Rates(Callback):
    """Learning rates before every step."""

    def __init__(self) -> None:
        self.rates: list[list[float]] = []

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        self.rates.append([optimizer.param_groups[0]["lr"] for optimizer in trainer.optimizers])


def checkpoint(folder: Path, step: int) -> Checkpoint:
    return torch.load(folder / "checkpoints" / f"step={step:09d}.ckpt", weights_only=True)


def optimizer_tensors(saved: Checkpoint) -> list[Tensor]:
    states = [state for optimizer in saved["optimizer_states"] for state in optimizer["state"].values()]
    return [value for state in states for value in state.values()]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(value, other[name]) for name, value in one.items())


def rollbacks(folder: Path) -> list[tuple[int, int, str]]:
    return [(it["step"], it["first_bad"], it["checkpoint"]) for it in records(folder) if it["event"] == "rollback"]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("check_every", "back_at"), [(1, 8), (3, 9)])
def test_all_of_the_checkpoint_returns_and_the_clock_goes_on(
    tmp_path: Path, check_every: int, back_at: int, fused: bool
) -> None:
    """Both networks, averages, LeCAM and both optimizers, of step 4; step 6, a bad one, was saved as well."""
    trained = Optimization(partial(torch.optim.AdamW, lr=1e-2, fused=fused), partial(CosineWithWarmup, warmup_steps=2))
    states, rates, unguarded = States(), Rates(), Rates()
    guard = NonFiniteGuard(max_in_a_row=3, check_every_n_steps=check_every, rollbacks=1)
    model = task(autoencoder_optimization=trained, discriminator_optimization=trained, ema_decay=0.5)
    callbacks = [Poison(ROW), guard, states, rates, ResumableCheckpoint(2, keep_last=-1)]
    fitted = trainer(tmp_path, 12, *callbacks, enable_checkpointing=True)
    said = (
        rf"3 steps from step 6 on were skipped.* after step {back_at} with the weights of step=0+4\.ckpt; 0 rollbacks"
    )
    with pytest.warns(UserWarning, match=said):
        fitted.fit(model, DataLoader(Noise(), batch_size=None))
    assert rollbacks(tmp_path) == [(back_at, 6, "step=000000004.ckpt")]
    before = checkpoint(tmp_path, 4)
    assert same(states.tasks[back_at], before["state_dict"])
    assert {"ema.network.tokenizer.decoder.output.weight", "objective.adversarial.lecam.real_average"} <= before[
        "state_dict"
    ].keys()
    pairs = zip(states.optimizers[back_at], optimizer_tensors(before), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)
    late = states.tasks[back_at - 1]
    changed = {name.split(".")[0] for name, value in before["state_dict"].items() if not torch.equal(value, late[name])}
    assert changed == {"model", "ema", "discriminator", "objective"}
    assert fitted.global_step == 12
    assert [config.scheduler.last_epoch for config in fitted.lr_scheduler_configs] == [12, 12]
    other = task(autoencoder_optimization=trained, discriminator_optimization=trained)
    trainer(tmp_path, 12, unguarded).fit(other, DataLoader(Noise(), batch_size=None))
    assert rates.rates == unguarded.rates
    assert rates.rates[8] != rates.rates[4]
    weights = [name for name in before["state_dict"] if name.startswith("model.") and "decoder.output" in name]
    for step in range(back_at, 11):
        assert not any(torch.equal(states.tasks[step][name], states.tasks[step + 1][name]) for name in weights)
    assert {int(state["step"]) for it in fitted.optimizers for state in it.state.values()} == {4 + 12 - back_at}
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_data_go_on_and_the_checkpoint_of_that_step_is_of_the_older_weights(cache: Path, tmp_path: Path) -> None:
    batches = []
    for name, poison in (("good", []), ("bad", ROW)):
        recorder, guard = Recorder(), NonFiniteGuard(max_in_a_row=3, check_every_n_steps=4, rollbacks=1)
        callbacks = [Poison(poison), guard, recorder, ResumableCheckpoint(4, keep_last=-1)]
        fitted = trainer(tmp_path / name, 12, *callbacks, enable_checkpointing=True)
        fitted.fit(diffusion(), datamodule=latent_shards(cache))
        batches.append([(batch["indices"].tolist(), int(batch["position"])) for batch in recorder.batches])
        assert len(guard.rollback.spans) == len(poison) / 3
    assert batches[0] == batches[1]
    older, newer = (checkpoint(tmp_path / "bad", step) for step in (4, 8))
    assert same(older["state_dict"], newer["state_dict"])
    assert all(torch.equal(*pair) for pair in zip(optimizer_tensors(older), optimizer_tensors(newer), strict=True))
    assert newer["global_step"] == 8
    assert newer["non_finite_guard"]["rollbacks"] == [[6, 8]]
    assert newer["non_finite_guard"]["in_a_row"] == 0


def test_the_number_is_limited_and_nothing_from_a_bad_row_returns(cache: Path, tmp_path: Path) -> None:
    """Steps 5 to 7, 9 to 11 and 13 to 15; steps 3, 6, 9 and 12 are saved, 6 and 9 between bad ones."""
    bad = [4, 5, 6, 8, 9, 10, 12, 13, 14]
    guard = NonFiniteGuard(max_in_a_row=3, check_every_n_steps=4, rollbacks=2)
    fitted = trainer(
        tmp_path, 20, Poison(bad), guard, ResumableCheckpoint(3, keep_last=-1),
        enable_checkpointing=True, logger=TensorBoardLogger(tmp_path, name="", version=""),
    )  # fmt: skip
    with pytest.raises(NonFiniteError, match=r"3 steps .* from step 13 on .*max_in_a_row=3, rollbacks=2.*12\.ckpt"):
        fitted.fit(diffusion(), datamodule=latent_shards(cache))
    assert rollbacks(tmp_path) == [(8, 5, "step=000000003.ckpt"), (12, 9, "step=000000003.ckpt")]
    assert curves(tmp_path)["guard/rollbacks"] == [(8, 1.0), (12, 2.0)]
    assert [step_of(path) for path in complete_checkpoints(tmp_path)] == [3, 6, 9, 12]
    assert same(checkpoint(tmp_path, 3)["state_dict"], checkpoint(tmp_path, 12)["state_dict"])


def test_a_second_row_returns_to_what_was_saved_since_the_first(tmp_path: Path) -> None:
    """Complete checkpoints only; the step of a rollback itself is saved with the older weights, and good."""
    (tmp_path / "checkpoints").mkdir()
    for step in (3, 4, 6, 8):
        (tmp_path / "checkpoints" / f"step={step:09d}.ckpt").touch()
    (tmp_path / "checkpoints" / ".step=000000009.ckpt.partial").touch()
    (tmp_path / "checkpoints" / "step=000000010.ckpt").mkdir()  # a folder without content
    rollback = Rollback(3)
    newest = {first_bad: rollback.newest(tmp_path, first_bad) for first_bad in (3, 4, 5, 12)}
    assert {first: path and step_of(path) for first, path in newest.items()} == {3: None, 4: 3, 5: 4, 12: 8}
    rollback.spans = [[4, 8]]
    newest = {first_bad: rollback.newest(tmp_path, first_bad) for first_bad in (8, 9)}
    assert {first: path and step_of(path) for first, path in newest.items()} == {8: 3, 9: 8}
    assert rollback.left == 2


@pytest.mark.parametrize("callbacks", [[], [ResumableCheckpoint(6)], [ResumableCheckpoint(1, keep_last=1)]])
def test_without_a_checkpoint_training_ends(cache: Path, tmp_path: Path, callbacks: list[Callback]) -> None:
    """None, none yet, and none that is left of those from before."""
    guard, states = NonFiniteGuard(max_in_a_row=3, check_every_n_steps=4, rollbacks=1), States()
    model = diffusion()
    fitted = trainer(tmp_path, 12, Poison(ROW), guard, states, *callbacks, enable_checkpointing=bool(callbacks))
    with pytest.raises(NonFiniteError, match=r"not finite in 3 steps.*no checkpoint from before step 6 .*keep_last"):
        fitted.fit(model, datamodule=latent_shards(cache))
    assert fitted.global_step == 8
    assert guard.rollback.left == 1
    for name, value in model.state_dict().items():
        assert torch.equal(value, states.tasks[5][name]) or name.startswith("emas.")  # of the last good step
    assert rollbacks(tmp_path) == []


def test_weights_that_are_not_finite_recover(cache: Path, tmp_path: Path) -> None:
    """Skipping alone would never end: all losses after step 5 are NaN, whatever the batch."""

    class Break(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 5:
                next(pl_module.denoiser.parameters()).data.fill_(float("inf"))

    guard, model = NonFiniteGuard(max_in_a_row=3, check_every_n_steps=4, rollbacks=1), diffusion()
    callbacks = [RecordScalars(), Break(), guard, ResumableCheckpoint(4)]
    trainer(tmp_path, 12, *callbacks, enable_checkpointing=True).fit(model, datamodule=latent_shards(cache))
    finite = [line["train/loss"] == line["train/loss"] for line in scalars(tmp_path)]
    assert finite == [True] * 5 + [False] * 3 + [True] * 4
    assert guard.skipped_steps == 3
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_a_checkpoint_that_is_still_being_written_is_waited_for(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is written before it is asked for."""
    write, wait, asked = checkpoint_files.write_file, CheckpointFiles.wait, threading.Event()

    def write_when_asked(*arguments: Any) -> None:
        asked.wait(10)
        write(*arguments)

    def ask(files: CheckpointFiles) -> None:
        asked.set()
        wait(files)

    monkeypatch.setattr(checkpoint_files, "write_file", write_when_asked)
    monkeypatch.setattr(CheckpointFiles, "teardown", ask)
    guard = NonFiniteGuard(max_in_a_row=3, check_every_n_steps=1, rollbacks=1)
    callbacks = [Poison(ROW), guard, ResumableCheckpoint(4, asynchronous=True)]
    trainer(tmp_path, 8, *callbacks, enable_checkpointing=True).fit(diffusion(), datamodule=latent_shards(cache))
    assert rollbacks(tmp_path) == [(8, 6, "step=000000004.ckpt")]


class TestContinuation:
    """A run of sixteen steps, saved after every fourth, that is stopped and continued."""

    def part(self, cache: Path, folder: Path, *callbacks: Callback) -> None:
        folder.mkdir(exist_ok=True)
        guard = NonFiniteGuard(max_in_a_row=2, check_every_n_steps=4, rollbacks=2)
        common = [RecordScalars(), Poison([4, 5, 8, 9]), guard, ResumableCheckpoint(4, keep_last=-1)]
        trained = Optimization(partial(torch.optim.AdamW, lr=1e-2), partial(CosineWithWarmup, warmup_steps=2))
        fitted = trainer(folder, 16, *common, *callbacks, enable_checkpointing=True)
        path = resolve_checkpoint("last", folder, "fit")
        fitted.fit(diffusion(optimization=trained), datamodule=latent_shards(cache), ckpt_path=path)

    @pytest.fixture(scope="class")
    def whole(self, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("rollback") / "whole"
        self.part(cache, folder)
        return folder

    @pytest.mark.parametrize("stops", [(5,), (6, 7), (8,), (9, 11), (13,)])
    def test_equals_a_run_that_was_not_stopped(
        self, whole: Path, cache: Path, tmp_path: Path, stops: tuple[int, ...]
    ) -> None:
        """Between bad steps, when they are enough but training has not yet gone back, then, and afterwards."""
        for stop in stops:
            self.part(cache, tmp_path, StopAt(stop))
        self.part(cache, tmp_path)
        assert records(whole) == records(tmp_path)
        assert rollbacks(whole) == [(8, 5, "step=000000004.ckpt"), (12, 9, "step=000000008.ckpt")]
        losses = [[json.dumps(line["train/loss"]) for line in scalars(folder)] for folder in (whole, tmp_path)]
        assert losses[0] == losses[1]
        assert [number for number, loss in enumerate(losses[0]) if loss == "NaN"] == [4, 5, 8, 9]
        first, second = (checkpoint(folder, 16) for folder in (whole, tmp_path))
        assert same(first["state_dict"], second["state_dict"])
        assert all(torch.equal(*pair) for pair in zip(optimizer_tensors(first), optimizer_tensors(second), strict=True))
        assert first["non_finite_guard"] == second["non_finite_guard"]
        assert first["non_finite_guard"]["rollbacks"] == [[5, 8], [9, 12]]
        assert first["lr_schedulers"] == second["lr_schedulers"]

    def test_a_restart_counts_what_was_before(self, cache: Path, tmp_path: Path) -> None:
        """Stopped after the first rollback, and continued with one allowed in all: the second ends it."""
        self.part(cache, tmp_path, StopAt(8))
        guard = NonFiniteGuard(max_in_a_row=2, check_every_n_steps=4, rollbacks=1)
        fitted = trainer(tmp_path, 16, Poison([8, 9]), guard, ResumableCheckpoint(4), enable_checkpointing=True)
        with pytest.raises(NonFiniteError, match=r"from step 9 on .*rollbacks=1"):
            fitted.fit(diffusion(), datamodule=latent_shards(cache), ckpt_path=str(complete_checkpoints(tmp_path)[-1]))
        assert guard.rollback.spans == [[5, 8]]
