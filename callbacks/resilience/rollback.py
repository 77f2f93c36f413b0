"""Return to the weights of an older checkpoint while training continues."""

from pathlib import Path

from lightning.pytorch import LightningModule, Trainer

from maetok.checkpoints.restoring import restore_states
from maetok.checkpoints.runs import complete_checkpoints, step_of


class Rollback:
    """Gives a task the weights, moving averages, buffers and optimizer states from before a row of bad steps.

    Step counter, schedules, data order, masks and noise continue, so the failing combination does not come back: older
    weights meet later data, as in the training of PaLM (Chowdhery et al. 2022, section 5.1).

    Args:
        limit: number of rollbacks in one run, over all its restarts.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.spans: list[list[int]] = []
        """First bad step of each rollback, and the step after which it came."""

    @property
    def left(self) -> int:
        """Return how many rollbacks are left."""
        return max(0, self.limit - len(self.spans))

    def run(self, trainer: Trainer, pl_module: LightningModule, first_bad: int) -> Path | None:
        """Roll back to before the step ``first_bad``. All processes call this together, between two steps.

        Returns:
            The checkpoint, the same on all processes; None, and nothing changes, if there is none.
        """
        trainer.strategy.checkpoint_io.teardown()  # the newest may still be being written
        trainer.strategy.barrier()
        path = trainer.strategy.broadcast(self.newest(trainer.default_root_dir, first_bad))
        if path is not None:
            restore_states(path, pl_module, trainer.optimizers)
            self.spans.append([first_bad, trainer.global_step])
        return path

    def newest(self, run_directory: str | Path, first_bad: int) -> Path | None:
        """Return the newest complete checkpoint from before that step, outside earlier rows of bad steps."""
        found = [
            path
            for path in complete_checkpoints(run_directory)
            if step_of(path) < first_bad and not any(first <= step_of(path) < last for first, last in self.spans)
        ]
        return found[-1] if found else None
