"""Mask ratios and masks, as functions of uniform numbers that the caller supplies."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class MaskRatio:
    """Distribution of the share of masked patches, one draw per image (paper section 3.2).

    ``uniform`` in [low, high] is the paper's; ``truncated_normal`` is the released code's: a normal with mean ``high``
    and standard deviation 0.25 cut to [low, high], so that high ratios are likelier. ``high: 0`` turns masking off.

    Raises:
        ValueError: unless 0 <= low <= high < 1.
    """

    low: float = 0.4
    high: float = 0.6
    distribution: Literal["uniform", "truncated_normal"] = "uniform"

    def __post_init__(self) -> None:
        if not 0.0 <= self.low <= self.high < 1.0:
            raise ValueError(f"mask_ratio needs 0 <= low <= high < 1, got low={self.low}, high={self.high}")

    def __call__(self, uniform: Tensor) -> Tensor:
        """Return ratios (B,) in [low, high] from uniform numbers (B,) in [0, 1), by the quantile function."""
        if self.distribution == "uniform" or self.low == self.high:
            return self.low + (self.high - self.low) * uniform
        standard_deviation = 0.25
        # On the CPU: a copy to a GPU would wait for it.
        lowest = torch.special.ndtr(torch.tensor((self.low - self.high) / standard_deviation))
        quantile = torch.special.ndtri(lowest + uniform * (0.5 - lowest))
        return (self.high + standard_deviation * quantile).clamp(self.low, self.high)


def random_mask(ratios: Tensor, scores: Tensor) -> Tensor:
    """Mask the ``round(ratio * N)`` patches with the lowest scores.

    Args:
        ratios: (B,) share of masked patches.
        scores: (B, N) uniform numbers.

    Returns:
        (B, N) bool, True = masked.
    """
    ranks = scores.argsort(dim=1).argsort(dim=1)
    return ranks < (ratios * scores.shape[1]).round()[:, None]


class VisiblePatches(NamedTuple):
    """The visible patches in raster order, padded to the largest number in the batch."""

    indices: Tensor
    """(B, K) int64 patch numbers; masked patches pad images with fewer than K."""
    present: Tensor | None
    """(B, K) bool, False for padding; None if every image has K."""


def visible_patches(mask: Tensor, device: torch.device) -> VisiblePatches:
    """Return the patches that a mask leaves visible.

    The host reads their largest number, so it waits for a mask on an accelerator.

    Args:
        mask: (B, N) bool, True = masked.
        device: where the result goes.
    """
    counts = mask.shape[1] - mask.sum(dim=1)
    fewest, most = (int(count) for count in counts.aminmax())
    indices = mask.byte().argsort(dim=1, stable=True)[:, :most]
    present = torch.arange(most, device=mask.device) < counts[:, None] if fewest < most else None
    return VisiblePatches(
        indices.to(device, non_blocking=True), None if present is None else present.to(device, non_blocking=True)
    )
