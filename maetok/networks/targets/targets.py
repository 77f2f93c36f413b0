"""The contract of a feature target, which an auxiliary decoder predicts."""

from abc import ABC, abstractmethod
from typing import Literal

from torch import Tensor, nn


class FeatureTarget(nn.Module, ABC):
    """A fixed feature of each image patch.

    ``dim`` is the number of values per patch; ``loss`` names how predictions are compared: ``mse``, or ``cosine`` of
    unit vectors.
    """

    dim: int
    loss: Literal["mse", "cosine"]
    patch_size: int

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, 3, H, W) in [-1, 1] -> (B, N, dim) for N = (H / patch_size) * (W / patch_size)."""

    @abstractmethod
    def picture(self, features: Tensor, grid: tuple[int, int], reference: Tensor) -> Tensor:
        """Draw features (B, N, dim) as images (B, 3, h, w) in [-1, 1]; the true features ``reference`` set colours."""
