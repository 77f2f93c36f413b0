"""Improved precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991)."""

import torch
from torch import Tensor


def squared_distances(rows: Tensor, columns: Tensor) -> Tensor:
    """Squared Euclidean distances (n, m) of float64 vectors (n, D) and (m, D); those of whole numbers are exact."""
    norms = rows.square().sum(1)[:, None] + columns.square().sum(1)
    return torch.addmm(norms, rows, columns.T, alpha=-2.0).clamp_min_(0)


def squared_radii(features: Tensor, neighbours: int, chunk: int) -> Tensor:
    """Squared distance (n,) of each vector (n, D) to its k-th nearest neighbour among the others."""
    # The vector itself is the nearest of all.
    parts = [squared_distances(rows, features).kthvalue(neighbours + 1).values for rows in features.split(chunk)]
    return torch.cat(parts)


def share_inside(features: Tensor, centres: Tensor, radii: Tensor, chunk: int) -> float:
    """Share of the vectors (n, D) that lie in at least one of the balls around ``centres`` (m, D)."""
    inside = [(squared_distances(rows, centres) <= radii).any(1) for rows in features.split(chunk)]
    return torch.cat(inside).double().mean().item()


def precision_recall(
    samples: Tensor, references: Tensor, neighbours: int = 3, chunk: int = 1000
) -> tuple[float, float]:
    """Share of samples within the manifold of the references, and of references within that of the samples.

    The manifold of a set is the union of the balls around its members that reach to their k-th neighbours. Distances
    are computed in float64, so that no rounding decides who lies inside; those of the ADM evaluation suite are float16.

    Args:
        samples: (n, D) features of the images to be judged.
        references: (m, D) features of real images.
        neighbours: k; 3 in the paper and in the ADM evaluation suite.
        chunk: rows of the distance matrix that are in memory at a time.

    Returns:
        Precision and recall, in [0, 1].

    Raises:
        ValueError: if a set has no more members than neighbours are asked for.
    """
    for name, features in (("samples", samples), ("references", references)):
        if len(features) <= neighbours:
            raise ValueError(f"{neighbours} neighbours need more images than that, got {len(features)} {name}")
    samples, references = samples.double(), references.double()
    precision = share_inside(samples, references, squared_radii(references, neighbours, chunk), chunk)
    recall = share_inside(references, samples, squared_radii(samples, neighbours, chunk), chunk)
    return precision, recall
