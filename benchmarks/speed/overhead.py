"""Cost of logging, moving average, gradient norm and callbacks in a training step.

Run ``python -m benchmarks.speed.overhead``.

The real command line trains MAETok-B at 256 pixels with HOG as its only target. Frozen networks, perceptual loss and
discriminator would make a step several times as long and the share smaller. Clocks within that one run time the
functions. Two runs, with and without the functions, would differ by more than the few tenths of a percent in question.
Times are CPU seconds of the process, which other processes hardly disturb.
"""

import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

from lightning.pytorch import Callback
from torch import nn

from benchmarks.harness import Case, Numbers, run_case
from callbacks import NonFiniteGuard
from datamodules.image_shards import ImageShards
from lightning_modules import TokenizerTraining
from maetok.training.ema import EMA
from maetok.training.step_guard import StepGuard
from main import main as command_line

CONFIGS = Path(__file__).parents[2] / "configs"
OVERLAY = """
trainer:
  {{accelerator: cpu, devices: 1, strategy: auto, precision: 32-true, limit_val_batches: 0, log_every_n_steps: 1}}
data:
  class_path: datamodules.Digits
  init_args: {{root: {folder}/digits, image_size: 256, batch_size: {batch_size}, loading: {{num_workers: 0}}}}
model:
  init_args:
    objective:
      init_args: {{weights: {{reconstruction: 1.0, perceptual: 0.0, adversarial: 0.0}}}}
"""
CLOCKS: dict[str, tuple[tuple[Any, str], ...]] = {
    "training_step": ((TokenizerTraining, "training_step"),),
    "preparation": ((ImageShards, "on_after_batch_transfer"),),
    "moving_average": ((EMA, "update"),),
    "gradient_norm": ((nn.utils, "clip_grad_norm_"), (StepGuard, "judge"), (StepGuard, "note_loss")),
    "logging_calls": ((TokenizerTraining, "log_scalars"),),
}
IN_STEP = ("moving_average", "gradient_norm", "logging_calls")


class Clocks(Callback):
    """Reads clocks at the starts of two batches, and ends training at the second.

    Args:
        warm_up: steps before those that are measured.
        steps: measured steps.
    """

    seconds: ClassVar[defaultdict[str, float]]
    """CPU seconds so far, by clock; :func:`clocks` adds to it."""
    per_step: ClassVar[dict[str, float]]
    """The same per measured step, with the whole loop and the loader."""

    def __init__(self, warm_up: int, steps: int) -> None:
        self.warm_up, self.steps = warm_up, steps
        self.before: dict[str, float] = {}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Let the guard check every step, as it checks the last steps of a run."""
        guard = next(callback for callback in trainer.callbacks if isinstance(callback, NonFiniteGuard))
        guard.check_every_n_steps = 1

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Read the clocks, and end when enough steps are measured."""
        waited = trainer.train_dataloader.seconds_waited
        now = {**Clocks.seconds, "whole": time.process_time(), "loader": waited}
        if batch_idx == self.warm_up:
            self.before = now
        elif batch_idx == self.warm_up + self.steps:
            Clocks.per_step = {name: (value - self.before.get(name, 0.0)) / self.steps for name, value in now.items()}
            raise SystemExit(0)  # without the checkpoint of the last step


@contextmanager
def clocks() -> Iterator[None]:
    """Put clocks around functions; the loader, which has one, reads CPU seconds."""
    Clocks.seconds, Clocks.per_step = defaultdict(float), {}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                Clocks.seconds[name] += time.process_time() - started

        return call

    with ExitStack() as stack:
        for name, places in CLOCKS.items():
            for owner, function in places:
                stack.enter_context(mock.patch.object(owner, function, timed(name, getattr(owner, function))))
        cpu_clock = SimpleNamespace(perf_counter=time.process_time)
        stack.enter_context(mock.patch("datamodules.sharded.time", cpu_clock))
        yield


def measure_overhead(batch_size: int = 4, warm_up: int = 2, steps: int = 3) -> Numbers:
    """Return shares of a step. Here every step logs and the guard checks it; real runs do so every 50th and 10th step.

    Loading and preparing images belong neither to the step nor to its overhead. Checkpoints and validation, every
    5000 steps, are left out.

    Args:
        batch_size: images per step.
        warm_up: steps before those that are measured; the first one counts FLOPs.
        steps: measured steps.

    Returns:
        CPU seconds of a step with all that it costs, the share of it that is overhead, and the parts of that share:
        moving average, gradient norm (with clipping and guard), calls that log, all callbacks, loggers and loop.

    Raises:
        RuntimeError: if training ends before the last clock is read.
    """
    with tempfile.TemporaryDirectory() as folder, clocks():
        overlay = Path(folder) / "overlay.yaml"
        overlay.write_text(OVERLAY.format(folder=folder, batch_size=batch_size))
        configs = [CONFIGS / "experiment/imagenet256_maetok_b128.yaml", CONFIGS / "ablation/mask_hog.yaml"]
        arguments = [f"--config={path}" for path in (*configs, overlay)] + [
            f"--trainer.default_root_dir={folder}/run",
            "--trainer.callbacks+=benchmarks.speed.overhead.Clocks",
            f"--trainer.callbacks.warm_up={warm_up}",
            f"--trainer.callbacks.steps={steps}",
        ]
        with suppress(SystemExit), redirect_stdout(sys.stderr):  # the harness prints the last line
            command_line(["fit", *arguments])
    if not Clocks.per_step:
        raise RuntimeError("training ended before the clocks were read; its output says why")
    return shares(Clocks.per_step)


def shares(seconds: dict[str, float]) -> Numbers:
    """Return the seconds of a step and its shares, from seconds per step by clock."""
    step = seconds["whole"] - seconds["loader"] - seconds["preparation"]
    parts = {name: seconds[name] for name in IN_STEP} | {"callbacks_and_loop": step - seconds["training_step"]}
    return {
        "step_cpu_seconds": step,
        "overhead_share": sum(parts.values()) / step,
        **{f"{name}_share": part / step for name, part in parts.items()},
    }


if __name__ == "__main__":
    numbers = run_case(Case("overhead", "benchmarks.speed.overhead:measure_overhead"))
    print(json.dumps(numbers, indent=1))
