"""Linear probing: how well classes can be told apart by a linear classifier on latents (paper section 4)."""

import warnings

import numpy as np


def linear_probe_accuracy(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    test_features: np.ndarray,
    test_labels: np.ndarray,
    iterations: int = 300,
) -> float:
    """Accuracy in [0, 1] of logistic regression on flattened, standardised features.

    Args:
        train_features: (n, ...) features to fit on; flattened to (n, d).
        train_labels: (n,) class indices.
        test_features: (m, ...) held-out features.
        test_labels: (m,) class indices.
        iterations: limit of L-BFGS iterations; stopping there is early stopping, not an error.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=iterations))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        probe.fit(train_features.reshape(len(train_features), -1), train_labels)
    return float(probe.score(test_features.reshape(len(test_features), -1), test_labels))
