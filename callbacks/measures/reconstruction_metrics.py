"""PSNR, SSIM and L1 of reconstructions over the whole validation split."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from maetok.metrics import reconstruction_metrics, to_unit_range


class ReconstructionMetrics(Callback):
    """Logs ``validation/psnr`` (dB), ``validation/ssim`` and ``validation/l1`` (share of the full range, in [0, 1]).

    Every valid sample counts exactly once, on any number of processes.
    """

    def __init__(self) -> None:
        self.metrics: Any = None

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start from zero."""
        if self.metrics is None:
            self.metrics = reconstruction_metrics(prefix="validation/")
        self.metrics.to(pl_module.device).reset()

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Reconstruct the valid samples of a batch and compare them."""
        images = batch["images"][batch["valid"]]
        if len(images):
            self.metrics.update(to_unit_range(pl_module.reconstruct(images)), to_unit_range(images))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the means over all processes."""
        pl_module.log_dict(self.metrics.compute(), prog_bar=True)

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end
