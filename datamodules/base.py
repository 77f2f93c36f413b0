"""The contents of a batch, as loaders yield it and as tasks and callbacks receive it."""

from typing import Any, Literal, TypedDict

import numpy as np
import torch
from torch import Tensor

from datamodules.shards import Fault

Split = Literal["train", "validation"]


class ImageBatch(TypedDict):
    """One batch of one process.

    A loader yields ``images`` as uint8. :func:`to_model_input` converts them to floats on the device, and tasks and
    callbacks receive these.
    """

    images: Tensor
    """(B, 3, H, W): uint8 with channels last in memory from a loader, float32 in [-1, 1] in tasks and callbacks."""
    labels: Tensor
    """(B,) int64 class indices; 0 where ``valid`` is False."""
    indices: Tensor
    """(B,) int64 index of each sample in its split; -1 where ``valid`` is False."""
    valid: Tensor
    """(B,) bool; False marks padding and broken samples. Only evaluation batches contain them."""
    position: Tensor
    """() int64: see :class:`datamodules.order.BatchReference`."""
    faults: list[Fault]
    """Broken samples of this batch; a training batch contains other samples instead."""


class LatentBatch(TypedDict):
    """One batch of cached latents of one process. The other entries are as in :class:`ImageBatch`."""

    latents: Tensor
    """(B, L, C) raw latents: in the stored dtype from a loader, float32 in tasks and callbacks."""
    labels: Tensor
    indices: Tensor
    valid: Tensor
    position: Tensor


def to_model_input(batch: ImageBatch) -> ImageBatch:
    """Convert uint8 images to float32 in [-1, 1], on their device."""
    images = batch["images"].to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1.0)
    return {**batch, "images": images}


def common_entries(labels: np.ndarray, indices: np.ndarray, position: int) -> dict[str, Any]:
    """Return the entries of a batch that do not depend on the kind of data.

    Args:
        labels: (n,) int64 labels of a split.
        indices: (B,) int64 index of each sample of the batch; negative for padding and broken samples.
        position: see :class:`datamodules.order.BatchReference`.
    """
    valid = indices >= 0
    return {
        "labels": np.where(valid, labels[indices], 0),
        "indices": indices,
        "valid": valid,
        "position": position,
    }
