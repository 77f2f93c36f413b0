"""Fréchet distance between two sets of images in the features of a network, as a torchmetrics metric."""

import torch
from torch import Tensor
from torchmetrics import Metric

from maetok.metrics.gaussians import frechet_distance, mean_and_covariance

__all__ = ["FrechetDistance", "frechet_distance"]


class FrechetDistance(Metric):
    """Collects features of both sets as sums in float64, which processes add up.

    Args:
        dim: number D of features.
    """

    full_state_update = False
    counts: Tensor
    sums: Tensor
    products: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        for name, shape in (("counts", (2,)), ("sums", (2, dim)), ("products", (2, dim, dim))):
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, features: Tensor, is_reference: bool) -> None:
        """Add features (n, D) of the reference images or of those to be judged."""
        row, values = int(is_reference), features.double()
        self.counts[row] += len(values)
        self.sums[row] += values.sum(0)
        self.products[row] += values.T @ values

    def compute(self) -> Tensor:
        """Return the distance.

        Raises:
            ValueError: for fewer images than features, where the estimate says nothing.
        """
        if self.counts.min() <= self.dim:
            raise ValueError(
                f"a Fréchet distance of {self.dim} features needs more images than that, got {int(self.counts.min())}: "
                "measure on more images, or with a smaller feature network"
            )
        moments = [mean_and_covariance(*state) for state in zip(self.counts, self.sums, self.products, strict=True)]
        return frechet_distance(*moments[0], *moments[1]).clamp_min(0)
