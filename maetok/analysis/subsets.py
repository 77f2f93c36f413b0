"""Choice of samples for an analysis."""

import numpy as np


def class_balanced(labels: np.ndarray, per_class: int, seed: int = 0) -> np.ndarray:
    """Draw at most ``per_class`` samples of each class at random, and return their sorted positions.

    Args:
        labels: (n,) class indices.
        per_class: largest number of samples of a class; a smaller class gives all its samples.
        seed: seeds the draw.

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
