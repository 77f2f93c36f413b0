"""A target from outside the package: the mean colour of each patch."""

import torch.nn.functional as F
from torch import Tensor

from maetok.networks import FeatureTarget


class MeanColourTarget(FeatureTarget):
    """Predict three numbers per patch by the squared error."""

    dim, loss = 3, "mse"

    def __init__(self, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, N, 3)."""
        return F.avg_pool2d(images, self.patch_size).flatten(2).transpose(1, 2)

    def picture(self, features: Tensor, grid: tuple[int, int], reference: Tensor) -> Tensor:
        """Return one pixel per patch."""
        return features.transpose(1, 2).unflatten(2, grid)
