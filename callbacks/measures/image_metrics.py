"""Metrics of reconstructions under the protocol ``rfid-val``."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from callbacks.measures.records import write_measurement
from callbacks.schedule import is_due
from maetok.losses import LPIPSLoss
from maetok.metrics import to_uint8
from maetok.metrics.evaluator import ImageEvaluator
from maetok.metrics.features import feature_network
from maetok.metrics.protocols import RFID_VAL

LOGGED = {
    "fid": "validation/rfid",
    "sfid": "validation/rsfid",
    "fd": "validation/reconstruction_fd",
    "sfd": "validation/reconstruction_sfd",
    "lpips": "validation/lpips",
}
"""PSNR and SSIM are logged by ``ReconstructionMetrics``, of images that are not rounded; here they go to the file."""


class ImageMetrics(Callback):
    """Measures reconstructions in the validation of the last step, in ``validate`` and in ``test``.

    The distance is logged as ``validation/rfid`` with Inception and as ``validation/reconstruction_fd`` with any other
    network. Everything, with the name and the hash of the protocol, is printed and appended to ``metrics.json`` in the
    run directory; ``python -m maetok.metrics --protocol rfid-val`` measures the same on files. Every valid sample is
    counted exactly once, on any number of processes; missing and repeated ones are errors.

    Args:
        features: Inception, or any network from images in [0, 1] to one vector each.
        lpips: network of LPIPS; null for none.
        every_n_steps: measure as well in the first validation at or after each multiple of this step; 0 for the last
            step only.
    """

    def __init__(self, features: nn.Module, lpips: LPIPSLoss | None = None, every_n_steps: int = 0) -> None:
        self.features, self.lpips, self.every_n_steps = feature_network(features), lpips, every_n_steps
        self.evaluator: ImageEvaluator | None = None
        self.broken = 0

    def measures(self, trainer: Trainer) -> bool:
        """Whether this validation is measured."""
        return not trainer.sanity_checking and is_due(trainer, self.every_n_steps)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start from nothing."""
        self.evaluator, self.broken = None, 0
        if self.measures(trainer):
            self.evaluator = ImageEvaluator(RFID_VAL, self.features, self.lpips, device=pl_module.device)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Collect the valid samples of one batch and their reconstructions."""
        if self.evaluator is None:
            return
        self.broken += len(batch["faults"])
        images, indices = batch["images"][batch["valid"]], batch["indices"][batch["valid"]]
        if len(images):
            self.evaluator.update_pairs(to_uint8(pl_module.reconstruct(images)), to_uint8(images), indices)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure over all processes; log, print, write."""
        if self.evaluator is None:
            for name in LOGGED.values():
                trainer.callback_metrics.pop(name, None)  # an older one is not this validation's
            return
        broken = int(trainer.strategy.reduce(torch.tensor(self.broken, device=pl_module.device), reduce_op="sum"))
        count = expected_samples(trainer)
        measurement = self.evaluator.compute(count, count, broken)
        self.evaluator = None
        for name, value in measurement.values.items():
            if name in LOGGED:
                pl_module.log(LOGGED[name], value, rank_zero_only=True)
        rank_zero_info(str(measurement))
        write_measurement(trainer, pl_module, measurement, {})

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end


def expected_samples(trainer: Trainer) -> int | None:
    """Samples of the validation split; None if a limit of the trainer cuts it short."""
    limit = trainer.limit_test_batches if trainer.state.fn == "test" else trainer.limit_val_batches
    if limit != 1.0 or isinstance(limit, int):
        return None
    return len(trainer.datamodule.index("validation"))  # type: ignore[attr-defined]
