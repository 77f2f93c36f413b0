"""Loss of predicting a feature target on masked patches (paper section 3.2)."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from maetok.runtime.distributed import mean_over_ranks


def masked_prediction_loss(
    predictions: Tensor, targets: Tensor, mask: Tensor | None, form: Literal["mse", "cosine"]
) -> Tensor:
    """Average the squared error or the negative cosine similarity over masked patches.

    Each process divides its sum by the mean number of masked patches per process, so averaged gradients equal the
    gradients of one large batch.

    Args:
        predictions: (B, N, dim).
        targets: (B, N, dim).
        mask: (B, N) bool, True = masked; ``None`` counts all patches.
        form: ``mse`` averages over ``dim`` as well; ``cosine`` lies in [-1, 1].

    Returns:
        float32 scalar; 0 if nothing is masked.

    Raises:
        ValueError: if the shapes differ.
    """
    if predictions.shape != targets.shape:
        raise ValueError(f"predictions {tuple(predictions.shape)} and targets {tuple(targets.shape)} differ in shape")
    predictions, targets = predictions.float(), targets.float()
    if form == "mse":
        per_patch = (predictions - targets).square().mean(-1)
    else:
        per_patch = -F.cosine_similarity(predictions, targets, dim=-1)
    if mask is None:
        return per_patch.mean()
    weight = mask.to(per_patch, non_blocking=True)
    return (per_patch * weight).sum() / mean_over_ranks(weight.sum()).clamp_min(torch.finfo(weight.dtype).tiny)
