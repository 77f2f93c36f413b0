"""k nearest neighbours: tells whether latents of a class lie together, without training a classifier."""

from typing import Literal

import numpy as np

from maetok.analysis.accuracy import Accuracy


def neighbour_accuracy(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    test_features: np.ndarray,
    test_labels: np.ndarray,
    neighbours: int = 20,
    distance: Literal["cosine", "euclidean"] = "cosine",
) -> Accuracy:
    """Return the held-out accuracy of the majority class among the nearest neighbours, with its 95 % interval.

    Features are flattened and standardised. Distances are computed block by block, without an (m, n) matrix.

    Args:
        train_features: (n, ...) features among which neighbours are found, float32 or float64.
        train_labels: (n,) class indices.
        test_features: (m, ...) held-out features.
        test_labels: (m,) class indices.
        neighbours: number of neighbours with one vote each; at most n. The lowest of equally frequent classes wins.
        distance: between standardised features.

    Raises:
        ValueError: if neighbours is less than 1.
    """
    if neighbours < 1:
        raise ValueError(f"neighbours={neighbours} must be at least 1")
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import Normalizer, StandardScaler

    # For unit vectors |a - b|^2 = 2 (1 - cos), so the memory-bounded Euclidean search serves both distances.
    directions = [Normalizer()] if distance == "cosine" else []
    vote = KNeighborsClassifier(min(neighbours, len(train_labels)), algorithm="brute")
    classifier = make_pipeline(StandardScaler(), *directions, vote)
    classifier.fit(train_features.reshape(len(train_features), -1), train_labels)
    predicted = classifier.predict(test_features.reshape(len(test_features), -1))
    return Accuracy.of(int((predicted == test_labels).sum()), len(test_labels))
