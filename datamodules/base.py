"""The batch contract that every image datamodule of this suite keeps."""

from typing import TypedDict

import torch
from torch import Tensor


class ImageBatch(TypedDict):
    """One batch of one process.

    A loader yields ``images`` as uint8; :func:`to_model_input` turns them into floats on the device, and that is what
    tasks and callbacks see.
    """

    images: Tensor
    """(B, 3, H, W): uint8 from the loader, float32 in [-1, 1] in tasks and callbacks."""
    labels: Tensor
    """(B,) int64 class indices; 0 where not valid."""
    indices: Tensor
    """(B,) int64 index of each sample in its split; -1 where not valid."""
    valid: Tensor
    """(B,) bool; False marks padding, which only evaluation batches have."""
    position: Tensor
    """() int64 position in the training order after this batch, counted over all processes; 0 in evaluation."""


def to_model_input(batch: ImageBatch) -> ImageBatch:
    """Turn uint8 images into float32 in [-1, 1], on whatever device they are."""
    images = batch["images"].to(torch.float32).div_(127.5).sub_(1.0)
    return {**batch, "images": images}
