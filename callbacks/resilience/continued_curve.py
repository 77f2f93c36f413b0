"""One TensorBoard curve for a run that was continued."""

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only


class ContinuedCurve(Callback):
    """Hides the steps that a killed run logged after the checkpoint from which this run continues.

    Each part of a run has its own event file in the run directory. The file of a continued run begins with a session
    start at a step, which tells readers to drop earlier files' values from that step on. Nothing is deleted.
    """

    @rank_zero_only
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write a session start for the step after the checkpoint."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        for logger in trainer.loggers:
            if trainer.global_step and isinstance(logger, TensorBoardLogger):
                start = Event(session_log=SessionLog(status=SessionLog.START))
                logger.experiment.file_writer.add_event(start, step=trainer.global_step + 1)
