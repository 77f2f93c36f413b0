"""Choosing samples for an analysis."""

import numpy as np


def class_balanced(labels: np.ndarray, per_class: int, seed: int = 0) -> np.ndarray:
    """Sorted positions of at most ``per_class`` samples of each class, drawn at random.

    Args:
        labels: (n,) class indices.
        per_class: largest number of samples of a class; a class with fewer gives all of its own.
        seed: of the draw.

    Raises:
        ValueError: if per_class is less than 1.
    """
    if per_class < 1:
        raise ValueError(f"per_class={per_class} must be at least 1")
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    shuffled = labels[order]
    rank_in_class = np.arange(len(order)) - np.searchsorted(shuffled, shuffled)
    return np.sort(order[rank_in_class < per_class])
