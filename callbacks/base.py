"""What callbacks share. Of a task they know ``encode``, ``reconstruct`` and ``views`` (lightning_modules/base.py)."""

from typing import Any

from lightning.pytorch import Trainer


def generator_step(trainer: Trainer, pl_module: Any) -> int:
    """The step that the weights have: the trainer's in ``fit``, the loaded checkpoint's in other subcommands."""
    return trainer.global_step or int(getattr(pl_module, "checkpoint_step", 0))
