"""Training with batches that are not finite: what moves, what is written, when it ends, and exact continuation."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from callbacks import NonFiniteGuard, ResumableCheckpoint
from callbacks.resilience.checkpointing import complete_checkpoints, resolve_checkpoint
from callbacks.resilience.non_finite_guard import LossHistory, NonFiniteError
from lightning_modules import CosineWithWarmup
from lightning_modules.optimization import Optimization
from tests.support.diffusion import (
    diffusion,
    latent_shards,
    optimization,
    trainer,
)
from tests.support.helpers import Poison, RecordScalars, States, StopAt, records, run_subprocess, scalars
from tests.support.tokenizer_training import fit, task


@pytest.mark.parametrize("fused", [True, False])
def test_a_bad_batch_moves_nothing_but_the_clock(tmp_path: Path, fused: bool) -> None:
    """Generator, discriminator, both optimizers and LeCAM stay bit for bit; step, schedules and averages go on."""
    adamw = partial(torch.optim.AdamW, lr=1e-2, fused=fused)
    options = {"autoencoder_optimization": Optimization(adamw, partial(CosineWithWarmup, warmup_steps=2))}
    model = task(discriminator_optimization=options["autoencoder_optimization"], ema_decay=0.5, **options)
    states = States()
    fitted = fit(model, tmp_path, 5, Poison([2]), NonFiniteGuard(), states)
    assert fitted.global_step == 5
    assert [config.scheduler.last_epoch for config in fitted.lr_scheduler_configs] == [5, 5]
    before, after = states.tasks[2], states.tasks[3]
    still = {name for name in before if torch.equal(before[name], after[name])}
    moving = {name for name in before if not name.startswith("ema.") and not name.endswith(("._u", "._v"))}
    assert moving <= still  # spectral norms estimate a little further, from the same weights
    assert len(moving) > 50
    for name in moving & {name for name in before if name.startswith("model.") and before[name].is_floating_point()}:
        kept = min(0.5, (1 + 3) / (10 + 3))
        expected = torch.lerp(before[f"ema.network.{name[6:]}"], before[name], 1 - kept)
        torch.testing.assert_close(after[f"ema.network.{name[6:]}"], expected)
        assert not torch.equal(before[name], states.tasks[4][name]), name  # the next step was taken
    assert all(torch.equal(*pair) for pair in zip(states.optimizers[2], states.optimizers[3], strict=True))
    steps = {int(state["step"]) for optimizer in fitted.optimizers for state in optimizer.state.values()}
    assert steps == {4}
    assert all(value.isfinite().all() for value in model.state_dict().values())
    [record] = records(tmp_path)
    assert (record["event"], record["step"], record["skipped"]) == ("non_finite", 3, ["autoencoder", "discriminator"])
    assert record["processes"][0]["losses"] == {"autoencoder": ["nan"], "discriminator": ["nan"]}


def test_one_of_several_micro_batches_is_enough_and_named(cache: Path, tmp_path: Path) -> None:
    """The third step of two micro-batches; the second of them is good."""

    class First(Poison):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx % 2 == 0:
                super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    guard, states = NonFiniteGuard(check_every_n_steps=3), States()
    data = latent_shards(cache)
    fitted = trainer(tmp_path, 4, First([2]), guard, states)
    fitted.fit(diffusion(accumulate_grad_batches=2), datamodule=data)
    assert data.position == 4 * 2 * 6
    weights = [{n: v for n, v in state.items() if n.startswith("denoiser.")} for state in states.tasks]
    assert all(torch.equal(weights[4][name], weights[6][name]) for name in weights[4])
    assert any(not torch.equal(weights[6][name], weights[2][name]) for name in weights[4])
    [record] = records(tmp_path)
    first, second = record["processes"][0]["losses"]["autoencoder"]
    assert first == "nan"
    assert second == pytest.approx(2.0, abs=1.5)
    order = list(latent_shards(cache).train_dataloader().batch_sampler.shuffle(0))  # 24 samples, 6 per micro-batch
    assert record["position"] == 36
    epochs = order + list(latent_shards(cache).train_dataloader().batch_sampler.shuffle(1))
    assert record["processes"][0]["indices"] == [epochs[24:30], epochs[30:36]]
    assert guard.skipped_steps == 1
    assert guard.in_a_row == 0


@pytest.mark.parametrize("check_every", [1, 4])
def test_training_ends_after_n_in_a_row_and_the_last_checkpoint_is_good(
    cache: Path, tmp_path: Path, check_every: int
) -> None:
    bad = [2, 4, 5, 6, 7, 8, 9]
    guard, states = NonFiniteGuard(max_in_a_row=3, check_every_n_steps=check_every), States()
    callbacks = [Poison(bad), guard, states, ResumableCheckpoint(2, keep_last=2)]
    with pytest.raises(NonFiniteError, match=r"in \d steps one after another.*max_in_a_row=3.*step=0000000\d\d\.ckpt"):
        trainer(tmp_path, 20, *callbacks, enable_checkpointing=True).fit(diffusion(), datamodule=latent_shards(cache))
    found = complete_checkpoints(tmp_path)
    assert [path.name for path in found] == ["step=000000004.ckpt", "step=000000006.ckpt"]
    assert [record["step"] for record in records(tmp_path)] == [step + 1 for step in bad[: guard.skipped_steps]]
    assert guard.skipped_steps == {1: 4, 4: 5}[check_every]  # every step, or step 4, checkpoint at 6 and step 8
    for path in found:
        state = torch.load(path, weights_only=True)["state_dict"]
        good = states.tasks[4]  # the last good step is the fourth
        compared = [name for name in state if name.startswith("denoiser.")]
        assert len(compared) > 10
        assert all(torch.equal(state[name], good[name]) for name in compared)
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_no_checkpoint_of_weights_that_are_not_finite(cache: Path, tmp_path: Path) -> None:
    class Break(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 3:
                pl_module.emas[0].network.input.bias.data[1] = float("inf")

    with pytest.raises(NonFiniteError, match=r"not finite at step 3.*step=000000002\.ckpt"):
        trainer(
            tmp_path, 9, Break(), NonFiniteGuard(), ResumableCheckpoint(1, keep_last=1), enable_checkpointing=True
        ).fit(diffusion(), datamodule=latent_shards(cache))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step=000000002.ckpt"]
    state = torch.load(complete_checkpoints(tmp_path)[0], weights_only=True)["state_dict"]
    assert all(value.isfinite().all() for value in state.values())


def test_a_run_with_skipped_steps_continues_bit_for_bit(cache: Path, tmp_path: Path) -> None:
    """Stopped between two skipped steps; counts and the history of losses go on as well."""
    guards = {}

    def part(name: str, *callbacks: Callback, last: bool = False) -> None:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        guards[name] = NonFiniteGuard(check_every_n_steps=4)
        common = [ResumableCheckpoint(3), RecordScalars(), Poison([1, 2, 3, 6]), guards[name]]
        fused = Optimization(partial(torch.optim.AdamW, lr=1e-2, fused=True), partial(CosineWithWarmup, warmup_steps=2))
        fitted = trainer(folder, 8, *common, *callbacks, enable_checkpointing=True)
        path = resolve_checkpoint("last", folder, "fit") if last else None
        fitted.fit(diffusion(optimization=fused, ema_decays=(0.5,)), datamodule=latent_shards(cache), ckpt_path=path)

    part("whole")
    part("parts", StopAt(3))
    assert guards["parts"].in_a_row == 2
    part("parts", last=True)
    assert guards["whole"].skipped_steps == guards["parts"].skipped_steps == 4
    assert guards["whole"].history.losses == guards["parts"].history.losses
    assert records(tmp_path / "whole") == records(tmp_path / "parts")
    whole, parts = scalars(tmp_path / "whole"), scalars(tmp_path / "parts")
    assert [line["step"] for line in whole] == [line["step"] for line in parts] == list(range(1, 9))
    losses = [[repr(line["train/loss"]) for line in lines] for lines in (whole, parts)]
    assert losses[0] == losses[1]
    assert [number for number, loss in enumerate(losses[0]) if loss == "nan"] == [1, 2, 3, 6]
    first, second = (torch.load(tmp_path / name / "checkpoints" / "step=000000008.ckpt") for name in ("whole", "parts"))
    assert all(torch.equal(value, second["state_dict"][name]) for name, value in first["state_dict"].items())


PROGRAM = """
import sys
from pathlib import Path
from tests.callbacks.test_non_finite_guard import distributed_run
distributed_run(Path(sys.argv[1]), Path(sys.argv[2]), 2)
"""


def distributed_run(cache: Path, folder: Path, devices: int) -> None:
    """Six steps of SGD, the third and fourth with a NaN on the last process."""
    folder = folder / str(devices)
    folder.mkdir(exist_ok=True)
    options = {"devices": devices, "strategy": "ddp" if devices > 1 else "auto"}
    guard, states = NonFiniteGuard(check_every_n_steps=4), States()
    fitted = trainer(folder, 6, Poison([2, 3], rank=devices - 1), guard, states, **options)
    model = diffusion(optimization=optimization("SGD", 0.05))
    fitted.fit(model, datamodule=latent_shards(cache))
    assert guard.skipped_steps == 2
    torch.save((states.tasks, model.state_dict()), folder / f"{fitted.global_rank}.pt")


def test_all_processes_skip_what_is_bad_on_one(cache: Path, tmp_path: Path) -> None:
    distributed_run(cache, tmp_path, 1)
    run_subprocess(PROGRAM, tmp_path, str(cache), str(tmp_path))
    _, expected = torch.load(tmp_path / "1" / "0.pt")
    states = [torch.load(tmp_path / "2" / f"{rank}.pt") for rank in (0, 1)]
    for tasks, last in states:
        for name, value in expected.items():
            torch.testing.assert_close(last[name], value, atol=1e-6, rtol=1e-6)
        weights = [name for name in tasks[2] if name.startswith("denoiser.")]
        assert all(torch.equal(tasks[2][name], tasks[4][name]) for name in weights)
        assert any(not torch.equal(tasks[4][name], tasks[5][name]) for name in weights)
    one, two = records(tmp_path / "1"), records(tmp_path / "2")
    assert [record["step"] for record in one] == [record["step"] for record in two] == [3, 4]
    for alone, together in zip(one, two, strict=True):
        losses = [process["losses"]["autoencoder"][0] for process in together["processes"]]
        assert isinstance(losses[0], float)  # the first process had good samples
        assert losses[1] == alone["processes"][0]["losses"]["autoencoder"][0] == "nan"
        [indices] = alone["processes"][0]["indices"]
        assert [process["indices"] for process in together["processes"]] == [[indices[0::2]], [indices[1::2]]]


class TestSpikes:
    """Losses far above the usual ones."""

    def test_median_and_deviation_by_hand(self) -> None:
        history = LossHistory(8)
        assert [history.add(loss) for loss in (1.0, 100.0)] == [(1.0, 0.0), (100.0, 0.0)]  # too few to tell
        for loss in (2.0, 3.0, 4.0):
            history.add(loss)
        median, deviations = history.add(9.0)  # median of 1, 2, 3, 4, 100; deviations 2, 1, 0, 1, 97
        assert median == 3.0
        assert deviations == pytest.approx(6 / 1.4826)
        constant = LossHistory(4)
        for _ in range(4):
            constant.add(2.0)
        assert constant.add(2.001)[1] == pytest.approx(0.5)  # a thousandth of the median counts as one

    def test_is_recorded_and_trained_on(self, tmp_path: Path) -> None:
        guard, states = NonFiniteGuard(spike_window=8), States()
        fit(task(adversarial=0.0), tmp_path, 8, Poison([5], factor=30.0), guard, states)
        [record] = records(tmp_path)
        assert (record["event"], record["step"], guard.loss_spikes, guard.skipped_steps) == ("loss_spike", 6, 1, 0)
        assert record["loss"] > 10
        assert record["median"] < 3
        assert record["deviations"] > 8
        changed = [name for name, value in states.tasks[5].items() if not torch.equal(value, states.tasks[6][name])]
        assert "model.tokenizer.decoder.output.weight" in changed
