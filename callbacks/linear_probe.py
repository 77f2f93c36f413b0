"""Linear-probe accuracy of the latents, an early sign of how easy the latent space is for a diffusion model."""

from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer

from maetok.analysis import linear_probe_accuracy


class LinearProbe(Callback):
    """Fits a linear classifier on training latents and logs its accuracy on validation latents.

    Logged as ``validation/linear_probe`` in [0, 1], at the end of training and in ``validate`` and, with ``every``, in
    each so-many-th validation. The datamodule must offer ``evaluation_dataloader(split)``.

    Args:
        every: probe in every n-th validation during training; 0 for the last step only.
        max_samples: largest number of samples to encode from each split.
    """

    def __init__(self, every: int = 0, max_samples: int = 20_000) -> None:
        self.every, self.max_samples, self.validations = every, max_samples, 0

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Encode both splits, fit, log."""
        if trainer.sanity_checking:
            return
        self.validations += 1
        is_last = trainer.state.fn != "fit" or trainer.global_step >= trainer.max_steps > 0
        if not is_last and not (self.every and self.validations % self.every == 0):
            return
        train, validation = (self.latents_and_labels(trainer, pl_module, split) for split in ("train", "validation"))
        accuracy = linear_probe_accuracy(*train, *validation) if trainer.is_global_zero else 0.0
        accuracy = trainer.strategy.broadcast(accuracy)
        pl_module.log("validation/linear_probe", accuracy, rank_zero_only=True)

    @torch.no_grad()
    def latents_and_labels(self, trainer: Trainer, pl_module: Any, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Latents (n, L, C) float32 and labels (n,) of a split, gathered from all processes."""
        latents, labels, valid, seen = [], [], [], 0
        for loaded in trainer.datamodule.evaluation_dataloader(split):  # type: ignore[attr-defined]
            batch = trainer.strategy.batch_to_device(loaded)
            latents.append(pl_module.encode(batch["images"]).float())
            labels.append(batch["labels"])
            valid.append(batch["valid"])
            seen += len(batch["labels"]) * trainer.world_size
            if seen >= self.max_samples:
                break
        gathered = [pl_module.all_gather(torch.cat(parts)) for parts in (latents, labels, valid)]
        if trainer.world_size > 1:
            gathered = [parts.flatten(0, 1) for parts in gathered]
        keep = gathered[2]
        return gathered[0][keep].cpu().numpy(), gathered[1][keep].cpu().numpy()
