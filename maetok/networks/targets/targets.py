"""What an auxiliary decoder has to predict."""

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
        """(B, 3, H, W) in [-1, 1] -> (B, N, dim) for N = (H / patch_size) * (W / patch_size), without gradient."""

    @abstractmethod
    def picture(self, features: Tensor, grid: tuple[int, int], reference: Tensor) -> Tensor:
        """Features (B, N, dim) as images (B, 3, h, w) in [-1, 1]; ``reference`` are true features that set colours."""
