"""Progress bar."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar

SHOWN = {"loss": "train/loss", "images/s": "throughput/images_per_second"}


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

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Loss and speed beside Lightning's numbers.

        Logged with ``prog_bar=True`` they would be read, which waits for a GPU, in every step instead of only when the
        bar is drawn.
        """
        metrics: dict[str, Any] = dict(super().get_metrics(trainer, pl_module))
        known = trainer.callback_metrics
        return metrics | {title: float(known[name]) for title, name in SHOWN.items() if name in known}
