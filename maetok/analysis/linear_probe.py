"""Linear probing: how well a linear classifier on latents tells classes apart (paper section 4)."""

import warnings
from typing import Literal

import numpy as np

from maetok.analysis.accuracy import Accuracy


def linear_probe_accuracy(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    test_features: np.ndarray,
    test_labels: np.ndarray,
    iterations: int = 300,
    view: Literal["flattened", "pooled"] = "flattened",
) -> Accuracy:
    """Return the held-out accuracy of logistic regression on standardised features, with its 95 % interval.

    Args:
        train_features: (n, ...) features to fit on, float32 or float64.
        train_labels: (n,) class indices.
        test_features: (m, ...) held-out features.
        test_labels: (m,) class indices.
        iterations: limit of L-BFGS iterations; reaching it stops early and is not an error.
        view: ``flattened`` flattens the features of a sample (paper); ``pooled`` averages latents (n, L, C) over the
            tokens to (n, C).
    """
    if len(np.unique(train_labels)) == 1:  # there is nothing to learn
        return Accuracy.of(int((test_labels == train_labels[0]).sum()), len(test_labels))
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    train, test = (
        features.mean(axis=1) if view == "pooled" else features.reshape(len(features), -1)
        for features in (train_features, test_features)
    )
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=iterations))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        probe.fit(train, train_labels)
    return Accuracy.of(int((probe.predict(test) == test_labels).sum()), len(test_labels))
