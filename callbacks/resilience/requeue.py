"""Stops a run on a signal, with a checkpoint, so that a cluster can queue it again."""

import os
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from callbacks.resilience.checkpointing import ResumableCheckpoint

MARKER = "requeue"
"""File in the run directory that asks slurm/fit.sbatch to queue the job again."""


class Requeue(Callback):
    """Ends training after USR1 or TERM: one checkpoint, exit code 0, and the file ``requeue`` in the run directory.

    Slurm sends USR1 before the time limit. It sends TERM when it needs the nodes, or when someone requeues or cancels
    the job; it does not wait for the batch script then. ``--ckpt_path last`` continues the run.

    The handler only notes the signal. After each optimizer step the processes agree whether any of them has received
    one, save that step together, and leave once its scalars are logged. The last step ends as usual.
    """

    def __init__(self) -> None:
        self.signalled, self.leaving, self.step = False, False, -1
        self.checkpoint: ResumableCheckpoint | None = None
        self.group: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the signal handlers from Lightning, which restores them after training."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        self.checkpoint = next((it for it in callbacks if isinstance(it, ResumableCheckpoint)), None)
        if self.checkpoint is None:
            if "SLURM_JOB_ID" in os.environ:
                rank_zero_warn("trainer.callbacks has no callbacks.ResumableCheckpoint: signals end this run unsaved")
            return
        self.signalled, self.leaving, self.step = False, False, trainer.global_step
        self.group = dist.new_group(backend="gloo") if trainer.world_size > 1 else None
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, self.note)
        # Before each batch Lightning would synchronise the processes, and wait for the GPU, to ask for a signal.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})  # fit.sbatch blocks it while this process starts

    def note(self, number: int, frame: FrameType | None) -> None:
        """Note a signal; this is the handler."""
        self.signalled = True

    def agreed(self) -> bool:
        """Return whether any process has received a signal; collective."""
        signalled = torch.tensor(int(self.signalled))
        if self.group is not None:
            dist.all_reduce(signalled, dist.ReduceOp.MAX, self.group)
        return bool(signalled)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        """Agree and save, after an optimizer step."""
        if self.checkpoint is None or trainer.global_step in (self.step, trainer.max_steps):
            return
        self.step = trainer.global_step
        self.leaving = self.agreed()
        if self.leaving:
            self.checkpoint.save(trainer)
            self.checkpoint.wait(trainer)  # the marker asks for a restart, so it must not come before the checkpoint
            if trainer.is_global_zero:
                (Path(trainer.default_root_dir) / MARKER).touch()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Leave after a signal; the scalars of the saved step are logged by now."""
        if self.leaving:
            rank_zero_info(f"stopped by a signal; step {self.step} is saved, continue with --ckpt_path last")
            raise SystemExit(0)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave after a signal without validating the saved step, for which there is no time."""
        if self.leaving:
            rank_zero_info(
                f"stopped by a signal; step {self.step} is saved and not validated: "
                "main.py validate measures it, --ckpt_path last continues"
            )
            raise SystemExit(0)
