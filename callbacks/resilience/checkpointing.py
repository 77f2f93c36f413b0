"""Checkpoints to continue a run from: writing, keeping and finding them."""

import json
import math
from pathlib import Path
from typing import Any, Literal

from jsonargparse.typing import NonNegativeInt, PositiveInt
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info

from maetok.checkpoints.files import CheckpointFiles, remove, remove_partial
from maetok.checkpoints.runs import complete_checkpoints, step_of
from maetok.formats.files import write_text

BEST_FILE = "best.json"


def resolve_checkpoint(ckpt_path: str | None, run_directory: str | Path, subcommand: str) -> str | None:
    """Return the checkpoint that a subcommand loads.

    ``last`` is the complete checkpoint of the run's latest step, ``best`` the one with the best metric. Any other value
    is returned unchanged.

    Args:
        ckpt_path: value of ``--ckpt_path``.
        run_directory: ``runs/<experiment>``.
        subcommand: with ``last``, ``fit`` starts at step 0 if there is no checkpoint; the others need one.

    Raises:
        FileNotFoundError: if one is needed and there is none.
        FileExistsError: if a new run would mix its checkpoints with an older run's.
    """
    found = complete_checkpoints(run_directory)
    if ckpt_path is None and subcommand == "fit" and found:
        raise FileExistsError(
            f"{run_directory} holds checkpoints of an earlier run, up to {found[-1].name}: continue it with "
            "--ckpt_path last, choose another --experiment, or remove the directory"
        )
    if ckpt_path == "best":
        steps = best_steps(Path(run_directory))
        found = sorted((path for path in found if step_of(path) in steps), key=lambda path: -steps.index(step_of(path)))
        if not found:
            raise FileNotFoundError(
                f"--ckpt_path best: {run_directory}/checkpoints has no measured checkpoint; set keep_best of "
                "callbacks.ResumableCheckpoint when training"
            )
    elif ckpt_path != "last":
        return ckpt_path
    if not found and subcommand != "fit":
        raise FileNotFoundError(f"--ckpt_path last: there is no checkpoint in {run_directory}/checkpoints")
    rank_zero_info(f"continuing from {found[-1]}" if found else f"no checkpoint in {run_directory}: starting at step 0")
    return str(found[-1]) if found else None


def best_steps(run_directory: Path) -> list[int]:
    """Return the steps of a run whose checkpoints were measured, the best first."""
    path = run_directory / "checkpoints" / BEST_FILE
    if not path.is_file():
        return []
    record = json.loads(path.read_text())
    sign = -1 if record["mode"] == "max" else 1
    return [int(step) for step, value in sorted(record["values"].items(), key=lambda entry: sign * entry[1])]


class ResumableCheckpoint(Checkpoint):
    """Saves ``checkpoints/step=000001000.ckpt`` at regular training steps and at the end of training.

    A checkpoint gets its name when it is complete on disk, so a killed job leaves no partial checkpoint under a valid
    name. It is a file, or a folder where a strategy shards. It is written before the validation of its step, so
    ``validate`` can measure a run that was killed in its last validation.

    Args:
        every_n_steps: training steps between checkpoints.
        keep_last: number of newest checkpoints to keep; -1 for all.
        keep_every_n_steps: also keep checkpoints at multiples of this; 0 for none.
        keep_best: also keep this many checkpoints with the best validation; 0 for none.
        monitor: the logged metric that decides which checkpoint is best.
        mode: whether a small (``min``) or large (``max``) metric is better.
        asynchronous: write while training continues; needs host memory for one checkpoint.
    """

    def __init__(
        self,
        every_n_steps: PositiveInt = 5000,
        keep_last: PositiveInt | Literal[-1] = 2,
        keep_every_n_steps: NonNegativeInt = 0,
        keep_best: NonNegativeInt = 0,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        asynchronous: bool = False,
    ) -> None:
        if (keep_best > 0) != (monitor is not None):
            raise ValueError(
                f"ResumableCheckpoint: keep_best={keep_best} and monitor={monitor} need each other: set both or neither"
            )
        self.every_n_steps, self.keep_last, self.keep_every_n_steps = every_n_steps, keep_last, keep_every_n_steps
        self.keep_best, self.monitor, self.mode = keep_best, monitor, mode
        self.files = CheckpointFiles(asynchronous)
        self.saved_step = -1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let :class:`maetok.checkpoints.files.CheckpointFiles` write and read checkpoints."""
        trainer.strategy.checkpoint_io = self.files  # type: ignore[assignment] # has the same methods

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the first step as saved, and remove partial checkpoints of a killed run."""
        self.saved_step = trainer.global_step
        if trainer.is_global_zero:
            remove_partial([Path(trainer.default_root_dir) / "checkpoints"])

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        """Save when the step counter has just reached a multiple of ``every_n_steps``."""
        if trainer.global_step % self.every_n_steps == 0:
            self.save(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save a checkpoint that may become the best, unless gradients for the next step have accumulated."""
        if self.keep_best and trainer.state.fn == "fit" and not getattr(pl_module, "micro_step", 0):
            self.save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the metric of this step.

        Raises:
            ValueError: if ``monitor`` was not logged.
        """
        if not self.keep_best or trainer.state.fn != "fit" or self.saved_step != trainer.global_step:
            return
        metric = trainer.callback_metrics.get(self.monitor or "")
        value = trainer.strategy.broadcast(None if metric is None else float(metric))  # each process has its own GPU
        if value is None:
            raise ValueError(
                f"ResumableCheckpoint monitor={self.monitor} is not logged in validation; the logged metrics are "
                f"{', '.join(sorted(trainer.callback_metrics))}"
            )
        if trainer.is_global_zero:
            path = Path(trainer.default_root_dir) / "checkpoints" / BEST_FILE
            values = json.loads(path.read_text())["values"] if path.is_file() else {}
            if math.isfinite(value):
                values[str(trainer.global_step)] = value
            record = {"monitor": self.monitor, "mode": self.mode, "values": values}
            write_text(path, json.dumps(record, indent=1))
            self.prune(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step and wait until it is on the disk."""
        self.save(trainer)
        self.wait(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Finish writing."""
        self.files.wait()

    def save(self, trainer: Trainer) -> None:
        """Save this step unless it is saved already. All processes call this together, between two optimizer steps."""
        if trainer.global_step == self.saved_step:
            return
        path = Path(trainer.default_root_dir) / "checkpoints" / f"step={trainer.global_step:09d}.ckpt"
        trainer.save_checkpoint(path)
        self.saved_step = trainer.global_step
        if trainer.is_global_zero:
            self.prune(trainer)

    def wait(self, trainer: Trainer) -> None:
        """Wait on all processes until everything saved is on the disk."""
        self.files.wait()
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            self.prune(trainer)

    def prune(self, trainer: Trainer) -> None:
        """Remove complete checkpoints that no rule keeps. A checkpoint that is still being written replaces none."""
        found = complete_checkpoints(trainer.default_root_dir)
        if self.keep_last < 0:
            return
        steps = [step_of(path) for path in found]
        best = [step for step in best_steps(Path(trainer.default_root_dir)) if step in steps][: self.keep_best]
        for path in found[: -self.keep_last]:
            step = step_of(path)
            if step not in best and not (self.keep_every_n_steps and step % self.keep_every_n_steps == 0):
                remove(path)
