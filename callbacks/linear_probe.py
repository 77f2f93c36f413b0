"""Linear-probe accuracy of the latents, an early sign of how easy the latent space is for a diffusion model."""

from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer

from maetok.analysis import linear_probe_accuracy


class LinearProbe(Callback):
    """Fits a linear classifier on training latents and logs its accuracy on validation latents.

    Logged as ``validation/linear_probe`` in [0, 1] in the validation of the last step and in ``validate``. The
    datamodule must offer ``evaluation_dataloader(split, max_samples)``. The first process fits while the others wait:
    keep ``max_samples`` and ``iterations`` small enough for the collective time limit.

    Args:
        every_n_steps: probe as well in validations at multiples of this step; 0 for the last step only.
        max_samples: largest number of samples from each split, taken evenly from all of it.
        iterations: limit of L-BFGS iterations of the classifier.
    """

    def __init__(self, every_n_steps: int = 0, max_samples: int = 10_000, iterations: int = 300) -> None:
        self.every_n_steps, self.max_samples, self.iterations = every_n_steps, max_samples, iterations

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Encode both splits, fit, log."""
        if trainer.sanity_checking:
            return
        is_last = trainer.state.fn != "fit" or trainer.global_step >= trainer.max_steps > 0
        if not is_last and (not self.every_n_steps or trainer.global_step % self.every_n_steps):
            trainer.callback_metrics.pop("validation/linear_probe", None)  # an older one is not this validation's
            return
        train, validation = (self.latents_and_labels(trainer, pl_module, split) for split in ("train", "validation"))
        accuracy = linear_probe_accuracy(*train, *validation, self.iterations) if trainer.is_global_zero else 0.0
        accuracy = trainer.strategy.broadcast(accuracy)
        pl_module.log("validation/linear_probe", accuracy, rank_zero_only=True)

    @torch.no_grad()
    def latents_and_labels(self, trainer: Trainer, pl_module: Any, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Latents (n, L, C) float32 and labels (n,) of a split, gathered from all processes."""
        latents, labels, valid = [], [], []
        loader = trainer.datamodule.evaluation_dataloader(split, self.max_samples)  # type: ignore[attr-defined]
        for loaded in loader:
            batch = trainer.strategy.batch_to_device(loaded)
            latents.append(pl_module.encode(batch["images"]).float())
            labels.append(batch["labels"])
            valid.append(batch["valid"])
        gathered = [pl_module.all_gather(torch.cat(parts)) for parts in (latents, labels, valid)]
        if trainer.world_size > 1:
            gathered = [parts.flatten(0, 1) for parts in gathered]
        keep = gathered[2]
        return gathered[0][keep].cpu().numpy(), gathered[1][keep].cpu().numpy()
