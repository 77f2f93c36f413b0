"""Progress bar."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar

SHOWN = {"loss": "train/loss", "images/s": "throughput/images_per_second"}


class StepProgressBar(TQDMProgressBar):
    """Shows the micro-batches done and needed for ``max_steps``; training data has no end of its own."""

    @property
    def total_train_batches(self) -> int | float:
        """Return the micro-batches of the whole training."""
        steps = self.trainer.max_steps
        return (
            steps * getattr(self.trainer.lightning_module, "accumulate_grad_batches", 1) if steps > 0 else float("inf")
        )

    def init_train_tqdm(self) -> Any:
        """Return Lightning's bar with a name that fits."""
        bar = super().init_train_tqdm()
        bar.set_description("train")
        return bar

    def on_train_epoch_start(self, trainer: Trainer, *arguments: Any) -> None:
        """Hide the number of the epoch: there is one endless epoch."""
        super().on_train_epoch_start(trainer, *arguments)
        self.train_progress_bar.set_description("train")

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Return loss and speed beside Lightning's numbers.

        With ``prog_bar=True`` Lightning would read them in every step, which waits for a GPU. Here they are read only
        when the bar is drawn.
        """
        metrics: dict[str, Any] = dict(super().get_metrics(trainer, pl_module))
        known = trainer.callback_metrics
        return metrics | {title: float(known[name]) for title, name in SHOWN.items() if name in known}
