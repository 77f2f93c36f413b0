"""How much of an image is masked, and which patches; all as functions of uniform numbers given by the caller."""

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
        """Ratios (B,) in [low, high] from uniform numbers (B,) in [0, 1), by the inverse distribution function."""
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
    """The patches that are not masked, in raster order, as many for each image as the one with most of them has."""

    indices: Tensor
    """(B, K) int64, numbers of patches; where an image has fewer than K, masked ones follow."""
    present: Tensor | None
    """(B, K) bool, False where a masked patch follows; None if every image has K."""


def visible_patches(mask: Tensor, device: torch.device) -> VisiblePatches:
    """Which patches a mask leaves.

    Their largest number is read from the mask: a mask on an accelerator makes the host wait for it.

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
