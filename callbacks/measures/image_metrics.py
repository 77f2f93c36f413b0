"""Metrics of reconstructions under the protocol ``rfid-val``."""

from collections.abc import Sequence
from typing import Any

import torch
from jsonargparse.typing import NonNegativeInt
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from callbacks.measures.protocol import ProtocolCallback
from maetok.losses import LPIPSLoss
from maetok.metrics import Metric, to_uint8
from maetok.metrics.evaluator import ImageEvaluator
from maetok.metrics.protocols import RFID_VAL


class ImageMetrics(ProtocolCallback):
    """Measures reconstructions in the validation of the last step, in ``validate`` and in ``test``.

    Logs the distance as ``validation/rfid`` with Inception and as ``validation/reconstruction_fd`` with any other
    network. Prints all results with the name and the hash of the protocol, and appends them to ``metrics.json`` in the
    run directory; ``python -m maetok.metrics --protocol rfid-val`` measures the same on files. Every valid sample
    counts exactly once, on any number of processes; a missing or repeated sample is an error.

    Args:
        features: Inception, or any network that maps images in [0, 1] to one vector each.
        lpips: network of LPIPS; null for none.
        every_n_steps: measure also in the first validation at or after each multiple of this step; 0 for the last
            step only.
        metrics: metrics to measure besides the protocol's, each a :class:`maetok.metrics.Metric`.
    """

    measured = "reconstruction"
    logged_elsewhere = ("psnr", "ssim")
    """``ReconstructionMetrics`` logs these from images that are not rounded to uint8."""

    def __init__(
        self,
        features: nn.Module,
        lpips: LPIPSLoss | None = None,
        every_n_steps: NonNegativeInt = 0,
        metrics: Sequence[Metric] = (),
    ) -> None:
        super().__init__(features, metrics, every_n_steps)
        self.lpips = lpips
        self.evaluator: ImageEvaluator | None = None
        self.broken = 0

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start with no images."""
        self.evaluator, self.broken = None, 0
        if self.measures(trainer):
            self.evaluator = ImageEvaluator(
                RFID_VAL, self.features, self.lpips, device=pl_module.device, metrics=self.metrics
            )

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Add the valid images of a batch and their reconstructions."""
        if self.evaluator is None:
            return
        self.broken += len(batch["faults"])
        images, indices = batch["images"][batch["valid"]], batch["indices"][batch["valid"]]
        if len(images):
            self.evaluator.update_pairs(to_uint8(pl_module.reconstruct(images)), to_uint8(images), indices)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure over all processes and report."""
        if self.evaluator is None:
            return self.forget(trainer)
        broken = int(trainer.strategy.reduce(torch.tensor(self.broken, device=pl_module.device), reduce_op="sum"))
        count = expected_samples(trainer)
        measurement = self.evaluator.compute(count, count, broken)
        self.evaluator = None
        return self.report(trainer, pl_module, measurement, {})

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end


def expected_samples(trainer: Trainer) -> int | None:
    """Return the number of samples in the validation split; None if a limit of the trainer cuts it short."""
    limit = trainer.limit_test_batches if trainer.state.fn == "test" else trainer.limit_val_batches
    if limit != 1.0 or isinstance(limit, int):
        return None
    return len(trainer.datamodule.index("validation"))  # type: ignore[attr-defined]
