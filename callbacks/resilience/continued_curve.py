"""One TensorBoard curve for a run of several parts."""

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only


class ContinuedCurve(Callback):
    """Hides what a killed run logged after the checkpoint that this one continues from.

    Each part of a run has an event file of its own in the run directory. A session start with a step, which comes first
    in that of a continued run, tells readers to drop what earlier files hold from that step on; nothing is deleted.
    """

    @rank_zero_only
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The first step of this part is the one after the checkpoint's."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        for logger in trainer.loggers:
            if trainer.global_step and isinstance(logger, TensorBoardLogger):
                start = Event(session_log=SessionLog(status=SessionLog.START))
                logger.experiment.file_writer.add_event(start, step=trainer.global_step + 1)
