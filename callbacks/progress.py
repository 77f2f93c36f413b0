"""Progress bar and throughput."""

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar


class StepProgressBar(TQDMProgressBar):
    """Shows micro-batches out of those that ``max_steps`` needs, since training data has no end of its own."""

    @property
    def total_train_batches(self) -> int | float:
        """Micro-batches of the whole training."""
        steps = self.trainer.max_steps
        return (
            steps * getattr(self.trainer.lightning_module, "accumulate_grad_batches", 1) if steps > 0 else float("inf")
        )

    def init_train_tqdm(self) -> Any:
        """Lightning's bar, named for what it shows."""
        bar = super().init_train_tqdm()
        bar.set_description("train")
        return bar

    def on_train_epoch_start(self, trainer: Trainer, *arguments: Any) -> None:
        """There is one endless epoch, so its number says nothing."""
        super().on_train_epoch_start(trainer, *arguments)
        self.train_progress_bar.set_description("train")


class Throughput(Callback):
    """Logs ``throughput/images_per_second`` over all processes, between two log steps and without validation time."""

    def __init__(self) -> None:
        self.images, self.seconds, self.started = 0, 0.0, 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock; waiting for data since the last batch counts when no validation came between."""
        if not self.started:
            self.started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count images, and log when Lightning logs."""
        self.images += len(batch["labels"]) * trainer.world_size
        if (batch_idx + 1) % trainer.log_every_n_steps:
            return
        self._stop_clock()
        pl_module.log("throughput/images_per_second", self.images / self.seconds)
        self.images, self.seconds, self.started = 0, 0.0, time.perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validation does not count."""
        if self.started:
            self._stop_clock()

    def _stop_clock(self) -> None:
        self.seconds += time.perf_counter() - self.started
        self.started = 0.0
