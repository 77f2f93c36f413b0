"""Going back to the weights of an older checkpoint while training goes on."""

from pathlib import Path

from lightning.pytorch import LightningModule, Trainer

from maetok.checkpoints.restoring import restore_states
from maetok.checkpoints.runs import complete_checkpoints, step_of


class Rollback:
    """Gives a task the weights, moving averages, buffers and optimizer states of before a row of bad steps again.

    Step counter, schedules, data order, masks and noise go on, so others follow than those that failed: older weights,
    later data, as in the training of PaLM (Chowdhery et al. 2022, section 5.1).

    Args:
        limit: how often in one run, over all its restarts.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.spans: list[list[int]] = []
        """Of each rollback so far the first bad step, and the step after which it came."""

    @property
    def left(self) -> int:
        """How many more there may be."""
        return max(0, self.limit - len(self.spans))

    def run(self, trainer: Trainer, pl_module: LightningModule, first_bad: int) -> Path | None:
        """Go back to before the step ``first_bad``; all processes call this together, between two steps.

        Returns:
            The checkpoint, the same on all processes; None, with nothing changed, if there is none.
        """
        trainer.strategy.checkpoint_io.teardown()  # one that is still being written may be the newest
        trainer.strategy.barrier()
        path = trainer.strategy.broadcast(self.newest(trainer.default_root_dir, first_bad))
        if path is not None:
            restore_states(path, pl_module, trainer.optimizers)
            self.spans.append([first_bad, trainer.global_step])
        return path

    def newest(self, run_directory: str | Path, first_bad: int) -> Path | None:
        """The newest complete checkpoint from before that step that was not written in a row of bad steps either."""
        found = [
            path
            for path in complete_checkpoints(run_directory)
            if step_of(path) < first_bad and not any(first <= step_of(path) < last for first, last in self.spans)
        ]
        return found[-1] if found else None
