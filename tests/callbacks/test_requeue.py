"""Signals end a run with one checkpoint, and it goes on as if there had been none."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from maetok.checkpoints.runs import complete_checkpoints
from tests.support.helpers import EXPERIMENTS, ROOT, TINY, curves, run, weights

STEPS = 6
OPTIONS = [
    f"--trainer.max_steps={STEPS}",
    f"--trainer.val_check_interval={STEPS}",
    "--trainer.callbacks.every_n_steps=10",
]


def signal_at(batch: int, name: str, rank: int = 0) -> list[str]:
    return [
        "--trainer.callbacks+=tests.support.helpers.SignalAt",
        f"--trainer.callbacks.batch={batch}",
        f"--trainer.callbacks.name={name}",
        f"--trainer.callbacks.rank={rank}",
    ]


def train_curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    return {tag: points for tag, points in curves(folder).items() if not tag.startswith("throughput/")}


def steps_saved(folder: Path) -> list[str]:
    return [path.stem for path in complete_checkpoints(folder)]


def test_two_processes_agree_save_once_and_go_on_exactly(tmp_path: Path, digits_root: Path) -> None:
    """Rank 1 alone has the signal, in step 3, with its loader process; scalars and weights are those without it."""

    def fit(folder: str, *more: str) -> None:
        command = [sys.executable, "main.py", "fit", f"--config={EXPERIMENTS / 'imagenet256_maetok_b128.yaml'}"]
        command += [f"--config={TINY}", f"--config={ROOT / 'configs' / 'overlay' / 'ddp.yaml'}", "--trainer.devices=2"]
        command += [f"--trainer.default_root_dir={tmp_path / folder}", f"--data.init_args.root={digits_root}"]
        command += ["--data.init_args.loading.num_workers=1", *OPTIONS, *more]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=300, check=False)
        assert result.returncode == 0, result.stderr.decode()[-6000:]

    fit("whole")
    fit("parts", *signal_at(2, "SIGUSR1", rank=1))
    assert steps_saved(tmp_path / "parts") == ["step=000000003"]
    assert (tmp_path / "parts" / "requeue").exists()
    fit("parts", "--ckpt_path=last")
    assert steps_saved(tmp_path / "parts") == ["step=000000003", "step=000000006"]
    whole, parts = train_curves(tmp_path / "whole"), train_curves(tmp_path / "parts")
    assert [step for step, _ in whole["train/loss"]] == [1, 2, 3, 4, 5, 6]
    assert whole == parts
    first, second = weights(tmp_path / "whole", STEPS), weights(tmp_path / "parts", STEPS)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_it_stops_between_optimizer_steps_and_without_validation(tmp_path: Path, digits_root: Path) -> None:
    """TERM in the first of the three micro-batches of step 2: that step is finished, and validation is due after it."""
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    more = ["--model.init_args.accumulate_grad_batches=3", *signal_at(3, "SIGTERM")]
    with pytest.raises(SystemExit) as stop:
        run("fit", "digits_tokenizer", tmp_path, digits_root, *OPTIONS, *more)
    assert stop.value.code == 0
    assert steps_saved(tmp_path) == ["step=000000002"]
    assert not (tmp_path / "metrics.jsonl").exists()
    assert (tmp_path / "requeue").exists()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == handlers


def test_a_signal_during_start_is_taken_in_the_first_step(tmp_path: Path, digits_root: Path) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})  # as `env --block-signal=USR1` in fit.sbatch
    try:
        signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)  # others of this process do not block it
        with pytest.raises(SystemExit):
            run("fit", "digits_tokenizer", tmp_path, digits_root, *OPTIONS)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
    assert steps_saved(tmp_path) == ["step=000000001"]
    assert (tmp_path / "requeue").exists()


def test_a_signal_in_the_last_step_lets_the_run_finish(tmp_path: Path, digits_root: Path) -> None:
    run("fit", "digits_tokenizer", tmp_path, digits_root, *OPTIONS, *signal_at(STEPS - 1, "SIGUSR1"))
    assert steps_saved(tmp_path) == ["step=000000006"]
    assert (tmp_path / "metrics.jsonl").exists()
    assert not (tmp_path / "requeue").exists()


def test_the_curve_of_a_crashed_run_goes_on_from_its_checkpoint(tmp_path: Path, digits_root: Path) -> None:
    """Saved at 4 and ended after 5: TensorBoard shows step 5 once, that of the continued run."""
    options = [*OPTIONS[:2], "--trainer.callbacks.every_n_steps=2"]
    run("fit", "digits_tokenizer", tmp_path / "whole", digits_root, *options)
    crash = ["--trainer.callbacks+=tests.support.helpers.CrashAt", "--trainer.callbacks.step=5"]
    with pytest.raises(RuntimeError, match="crash"):
        run("fit", "digits_tokenizer", tmp_path / "parts", digits_root, *options, *crash)
    assert [step for step, _ in curves(tmp_path / "parts")["train/loss"]] == [1, 2, 3, 4, 5]
    run("fit", "digits_tokenizer", tmp_path / "parts", digits_root, *options, "--ckpt_path=last")
    whole, parts = train_curves(tmp_path / "whole"), train_curves(tmp_path / "parts")
    assert [step for step, _ in parts["train/loss"]] == [1, 2, 3, 4, 5, 6]
    assert whole == parts


def test_processes_do_not_ask_each_other_for_signals_that_lightning_no_longer_gets(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, digits_root: Path
) -> None:
    loop = run("fit", "digits_tokenizer", tmp_path, digits_root).trainer.fit_loop.epoch_loop
    asked = []
    monkeypatch.setattr(torch.distributed, "broadcast", lambda *_, **__: asked.append(1))
    type(loop)._broadcast_sigterm_tensor(loop)
    assert len(asked) == 1
    loop._broadcast_sigterm_tensor()
    assert len(asked) == 1
