"""Latents of a split, gathered from all processes, for callbacks that analyse them."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch import Tensor


def gather_latents(trainer: Trainer, pl_module: Any, split: str, max_samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Return latents (n, L, C) float32 and labels (n,) int64 of a split, equal on any number of processes.

    Args:
        trainer: its datamodule must offer ``evaluation_dataloader(split, max_samples)`` with images.
        pl_module: the task, whose ``encode`` gives latents.
        split: ``train`` or ``validation``.
        max_samples: largest number of samples, spread evenly over the split.
    """
    latents, labels = gather(trainer, pl_module, split, max_samples, lambda images: [pl_module.encode(images).float()])
    return latents, labels


@torch.no_grad()
def gather(
    trainer: Trainer, pl_module: Any, split: str, max_samples: int, measure: Callable[[Tensor], Sequence[Tensor]]
) -> list[np.ndarray]:
    """Return what ``measure`` computes from images (B, 3, H, W) in [-1, 1], as :func:`gather_latents` does.

    ``measure`` returns tensors (B, ...). The result holds one array (n, ...) for each, and the labels (n,) int64 last.
    """
    parts = []
    loader = trainer.datamodule.evaluation_dataloader(split, max_samples)  # type: ignore[attr-defined]
    for loaded in loader:
        batch = trainer.strategy.batch_to_device(loaded)
        parts.append((*measure(batch["images"]), batch["labels"], batch["valid"], batch["indices"]))
    gathered = [pl_module.all_gather(torch.cat(column)) for column in zip(*parts, strict=True)]
    if trainer.world_size > 1:
        gathered = [column.flatten(0, 1) for column in gathered]
    *measured, valid, indices = gathered
    keep = valid.nonzero().flatten()
    keep = keep[indices[keep].argsort()]
    return [column[keep].cpu().numpy() for column in measured]
