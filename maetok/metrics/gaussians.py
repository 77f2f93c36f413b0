"""Mean and covariance of features, and the Fréchet distance between two Gaussians."""

from dataclasses import dataclass

import torch
from torch import Tensor

from maetok.runtime.distributed import gather_over_ranks, sum_over_ranks


def frechet_distance(mean: Tensor, covariance: Tensor, other_mean: Tensor, other_covariance: Tensor) -> Tensor:
    """Return |m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)), by symmetric eigendecompositions in float64.

    This is equation 6 of arXiv 1706.08500. The root has the same trace as (C^(1/2) C' C^(1/2))^(1/2), whose argument is
    symmetric.

    Args:
        mean: (D,) float64.
        covariance: (D, D) float64.
        other_mean: (D,) float64.
        other_covariance: (D, D) float64.

    Returns:
        Scalar float64, at least 0 up to rounding.
    """
    values, vectors = torch.linalg.eigh(covariance)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    product = torch.linalg.eigvalsh(root @ other_covariance @ root).clamp_min(0)
    distance = (mean - other_mean).square().sum()
    return distance + covariance.trace() + other_covariance.trace() - 2 * product.sqrt().sum()


def mean_and_covariance(count: Tensor, total: Tensor, product: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean (D,) and unbiased covariance (D, D) from count, sum (D,) and sum of outer products (D, D)."""
    mean = total / count
    return mean, (product - count * torch.outer(mean, mean)) / (count - 1)


@dataclass(frozen=True)
class Gaussian:
    """Holds the moments of a set of features.

    Args:
        mean: (D,) float64.
        covariance: (D, D) float64.
        count: number of vectors behind the estimate; None if unknown.
    """

    mean: Tensor
    covariance: Tensor
    count: int | None = None

    def distance(self, other: "Gaussian") -> float:
        """Return the Fréchet distance to another Gaussian, at least 0."""
        device = self.mean.device
        theirs = other.mean.to(device), other.covariance.to(device)
        return frechet_distance(self.mean, self.covariance, *theirs).clamp_min(0).item()


class Moments:
    """Collects features as count, sum and sum of outer products in float64, and adds them up over processes.

    Args:
        device: holds the sums; with several processes, the device of collective operations.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.sums: list[Tensor] = []

    def update(self, features: Tensor) -> None:
        """Add features (n, D)."""
        values = features.to(self.device, torch.float64)
        new = [values.new_tensor(float(len(values))), values.sum(0), values.T @ values]
        self.sums = [old.add_(value) for old, value in zip(self.sums, new, strict=True)] if self.sums else new

    def gaussian(self) -> Gaussian | None:
        """Return mean and covariance over all processes; None if there are fewer than two vectors."""
        dims = [dim for dim in gather_over_ranks(len(self.sums[1]) if self.sums else 0) if dim]
        if not dims:
            return None
        shapes = ((), (dims[0],), (dims[0], dims[0]))
        sums = self.sums or [torch.zeros(shape, dtype=torch.float64, device=self.device) for shape in shapes]
        count, total, product = (sum_over_ranks(value) for value in sums)
        return Gaussian(*mean_and_covariance(count, total, product), int(count)) if count > 1 else None
