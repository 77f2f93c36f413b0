"""A callback from outside the package: it knows a task only through ``encode``."""

from typing import Any

import torch
from lightning.pytorch import Callback, Trainer


class LatentSize(Callback):
    """Log the root mean square of validation latents as ``validation/latent_size``."""

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.sums = torch.zeros(2, dtype=torch.float64)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        latents = pl_module.encode(batch["images"][batch["valid"]]).double().cpu()
        self.sums += torch.tensor([latents.square().sum().item(), latents.numel()], dtype=torch.float64)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        pl_module.log("validation/latent_size", (self.sums[0] / self.sums[1]).sqrt().float())
