"""Run small experiments by the real command line, with callbacks that record, disturb or end them."""

import io
import json
import os
import signal
import subprocess
import sys
from contextlib import redirect_stdout, suppress
from multiprocessing import active_children, current_process
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from lightning.pytorch import Callback
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from maetok.checkpoints.files import read_weights
from main import MAETokCLI, main

ROOT = Path(__file__).parents[2]
EXPERIMENTS = ROOT / "configs" / "experiment"
TINY = ROOT / "configs" / "overlay" / "tiny.yaml"


def run(
    subcommand: str,
    experiment: str,
    folder: Path,
    digits_root: Path,
    *arguments: str,
    overlay: str = f"--config={TINY}",
) -> MAETokCLI:
    """Run an experiment under a tiny overlay in ``folder``."""
    return main(
        [
            subcommand,
            f"--config={EXPERIMENTS / experiment}.yaml",
            overlay,
            f"--trainer.default_root_dir={folder}",
            f"--data.init_args.root={digits_root}",
            "--trainer.enable_model_summary=false",
            *arguments,
        ]
    )


def printed_config(*arguments: str, subcommand: str = "fit") -> dict[str, Any]:
    """Return the config that the command line prints for these arguments, defaults included."""
    text = io.StringIO()
    with redirect_stdout(text), suppress(SystemExit):
        main([subcommand, *arguments, "--print_config"])
    return yaml.safe_load(text.getvalue())


class RecordScalars(Callback):
    """Appends what was logged in each step to ``scalars.jsonl`` in the run directory."""

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        known = trainer.callback_metrics.items()
        values = {name: float(value) for name, value in known if not name.startswith("throughput/")}
        with (Path(trainer.default_root_dir) / "scalars.jsonl").open("a") as file:
            file.write(json.dumps({"step": trainer.global_step, **values}) + "\n")


class StopAt(Callback):
    """Ends training after a step, as a stopped job does: schedules still expect all steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step >= self.step:
            trainer.should_stop = True


class Poison(Callback):
    """Multiplies one sample of one process by a factor, NaN by default, in the given steps, counted from 0."""

    def __init__(self, steps: list[int], rank: int = 0, factor: float = float("nan")) -> None:
        self.steps, self.rank, self.factor = steps, rank, factor

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step in self.steps and trainer.global_rank == self.rank:
            batch["latents" if "latents" in batch else "images"][-1] *= self.factor


class CrashAt(Callback):
    """Raises RuntimeError before the first micro-batch after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("crash")


class SignalAt(Callback):
    """Sends a signal to one rank and its loader processes, as a cluster does, before a micro-batch of a new run."""

    def __init__(self, batch: int, name: str, rank: int = 0) -> None:
        self.batch, self.number, self.rank = batch, signal.Signals[name], rank

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.batch and trainer.global_rank == self.rank and not trainer.ckpt_path:
            for process in [*active_children(), current_process()]:
                os.kill(process.pid, self.number)


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return the (step, value) pairs of each scalar in the TensorBoard log of a folder."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def scalars(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "scalars.jsonl").read_text().splitlines()]


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return read_weights(folder / "checkpoints" / f"step={step:09d}.ckpt")


def run_subprocess(program: str, folder: Path, *arguments: str, succeeds: bool = True) -> None:
    """Run a Python program from a file, so that Lightning can start it several times, with one thread per process."""
    path = folder / "program.py"
    path.write_text(program)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(path), *arguments]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=300, check=False)
    assert (result.returncode == 0) == succeeds, result.stderr.decode()[-6000:]


def run_module(module: str, folder: Path, *arguments: str, timeout: float = 1500) -> None:
    """Run a module of the tests in a new process with one thread; its first argument is the folder."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", module, str(folder), *arguments]
    with (folder / "output.log").open("w+") as output:
        options = {"cwd": ROOT, "env": environment, "stdout": output, "stderr": output, "timeout": timeout}
        result = subprocess.run(command, check=False, **options)
    assert result.returncode == 0, (folder / "output.log").read_text()[-6000:]


def run_main(subcommand: str, folder: Path, *arguments: str) -> None:
    """Run the command line in a new process, so that Lightning can start it several times; ``folder`` is the root."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "main.py", subcommand, *arguments, f"--trainer.default_root_dir={folder}"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=900, check=False)
    assert result.returncode == 0, result.stderr.decode()[-6000:]


def colours_of(path: Path) -> set[tuple[int, ...]]:
    """Return the colours (red, green, blue) of a picture."""
    pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
    return set(map(tuple, np.unique(pixels, axis=0).tolist()))


class States(Callback):
    """Records the state of the task and of its optimizers before every step."""

    def __init__(self) -> None:
        self.tasks: list[dict[str, torch.Tensor]] = []
        self.optimizers: list[list[torch.Tensor]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.tasks.append({name: value.clone() for name, value in pl_module.state_dict().items()})
        states = [state for optimizer in trainer.optimizers for state in optimizer.state.values()]
        self.optimizers.append([value.clone() for state in states for value in state.values()])


def records(folder: Path) -> list[dict[str, Any]]:
    """Return what a run wrote about its unusual steps."""
    return [json.loads(line) for line in (folder / "unusual_steps.jsonl").read_text().splitlines()]
