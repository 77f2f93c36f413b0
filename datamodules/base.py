"""The batch contracts that the datamodules of this suite keep."""

from typing import Literal, TypedDict

import torch
from torch import Tensor

from datamodules.shards import Fault

Split = Literal["train", "validation"]


class ImageBatch(TypedDict):
    """One batch of one process.

    A loader yields ``images`` as uint8; :func:`to_model_input` turns them into floats on the device, and that is what
    tasks and callbacks see.
    """

    images: Tensor
    """(B, 3, H, W): uint8 with channels last in memory from the loader, float32 in [-1, 1] in tasks and callbacks."""
    labels: Tensor
    """(B,) int64 class indices; 0 where not valid."""
    indices: Tensor
    """(B,) int64 index of each sample in its split; -1 where not valid."""
    valid: Tensor
    """(B,) bool; False marks padding and broken samples, which only evaluation batches have."""
    position: Tensor
    """() int64: see :class:`datamodules.order.BatchReference`."""
    faults: list[Fault]
    """Broken samples that this batch should have held: training batches hold others instead."""


class LatentBatch(TypedDict):
    """One batch of cached latents of one process; the other entries are as in :class:`ImageBatch`."""

    latents: Tensor
    """(B, L, C) raw latents: as stored from the loader, float32 in tasks and callbacks."""
    labels: Tensor
    indices: Tensor
    valid: Tensor
    position: Tensor


def to_model_input(batch: ImageBatch) -> ImageBatch:
    """Turn uint8 images into float32 in [-1, 1], on whatever device they are."""
    images = batch["images"].to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1.0)
    return {**batch, "images": images}
