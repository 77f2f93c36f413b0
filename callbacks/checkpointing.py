"""Checkpoints to continue a run from, and finding the newest of them."""

import os
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info

from maetok.checkpoints import complete_checkpoints


def resolve_checkpoint(ckpt_path: str | None, run_directory: str | Path, subcommand: str) -> str | None:
    """The checkpoint that a subcommand loads; ``last`` is that of the latest step of the run.

    Args:
        ckpt_path: value of ``--ckpt_path``.
        run_directory: ``runs/<experiment>``.
        subcommand: ``fit`` begins at step 0 where there is no checkpoint yet; the others need one.

    Raises:
        FileNotFoundError: if one is needed and there is none.
        FileExistsError: if a new run would mix its checkpoints with those of an older one.
    """
    found = complete_checkpoints(run_directory)
    if ckpt_path is None and subcommand == "fit" and found:
        raise FileExistsError(
            f"{run_directory} holds checkpoints of an earlier run, up to {found[-1].name}: continue it with "
            "--ckpt_path last, choose another --experiment, or remove the directory"
        )
    if ckpt_path != "last":
        return ckpt_path
    if not found and subcommand != "fit":
        raise FileNotFoundError(f"--ckpt_path last: there is no checkpoint in {run_directory}/checkpoints")
    rank_zero_info(f"continuing from {found[-1]}" if found else f"no checkpoint in {run_directory}: starting at step 0")
    return str(found[-1]) if found else None


class ResumableCheckpoint(Checkpoint):
    """Saves ``checkpoints/step=000001000.ckpt`` every so many generator steps and when training ends.

    A checkpoint gets its name when it is complete on disk, so a killed job leaves no torn file under a valid name. It
    is written before the validation of its step: a run killed in its last validation is measured by ``validate``.

    Args:
        every_n_steps: generator steps between checkpoints.
        keep_last: how many to keep; -1 for all.
    """

    def __init__(self, every_n_steps: int = 5000, keep_last: int = 2) -> None:
        if every_n_steps < 1 or keep_last not in (-1, *range(1, 1000)):
            raise ValueError(
                f"ResumableCheckpoint needs every_n_steps >= 1 and keep_last >= 1 (or -1 for all), got {every_n_steps} "
                f"and {keep_last}"
            )
        self.every_n_steps, self.keep_last, self.saved_step = every_n_steps, keep_last, -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The step a run continues from is saved already."""
        self.saved_step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        """Save when the step counter has just reached a multiple of ``every_n_steps``."""
        if trainer.global_step % self.every_n_steps == 0 and trainer.global_step != self.saved_step:
            self.save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step, whatever it is."""
        if trainer.global_step != self.saved_step:
            self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Write under a hidden name, flush, rename, and remove checkpoints beyond ``keep_last``."""
        path = Path(trainer.default_root_dir) / "checkpoints" / f"step={trainer.global_step:09d}.ckpt"
        hidden = path.with_name(f".{path.name}.partial")
        trainer.save_checkpoint(hidden)
        if trainer.is_global_zero:
            with open(hidden, "rb") as file:
                os.fsync(file.fileno())
            os.replace(hidden, path)
            if self.keep_last > 0:
                for old in complete_checkpoints(trainer.default_root_dir)[: -self.keep_last]:
                    old.unlink()
        trainer.strategy.barrier()
        self.saved_step = trainer.global_step
