"""When callbacks measure. They know a task only through the methods of ``lightning_modules/base.py``."""

from typing import Any

from lightning.pytorch import Trainer


def current_step(trainer: Trainer, pl_module: Any) -> int:
    """Return the step of the weights: the trainer's in ``fit``, the loaded checkpoint's in other subcommands."""
    return trainer.global_step or int(getattr(pl_module, "checkpoint_step", 0))


def is_last_validation(trainer: Trainer) -> bool:
    """Return whether this is the validation of the last training step, or of another subcommand than ``fit``."""
    return trainer.state.fn != "fit" or trainer.global_step >= trainer.max_steps > 0


def is_due(trainer: Trainer, every_n_steps: int) -> bool:
    """Return whether to measure in this validation.

    That is the last validation, and the first at or after each multiple of ``every_n_steps`` unless it is 0.
    """
    if is_last_validation(trainer) or not every_n_steps:
        return is_last_validation(trainer)
    micro_batches = getattr(trainer.lightning_module, "accumulate_grad_batches", 1)
    batches = trainer.global_step * micro_batches + getattr(trainer.lightning_module, "micro_step", 0)
    before = (batches - int(trainer.val_check_batch)) // micro_batches
    return trainer.global_step // every_n_steps > max(0, before) // every_n_steps


def forget_metrics(trainer: Trainer, *prefixes: str) -> None:
    """Remove the results of an earlier validation, which reports would take for results of this one."""
    for name in [name for name in trainer.callback_metrics if name.startswith(prefixes)]:
        del trainer.callback_metrics[name]
