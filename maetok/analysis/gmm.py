"""Gaussian mixtures, which tell how many modes a set of points has (paper section 4)."""

import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np

PAPER_COMPONENT_COUNTS = (5, 10, 50, 100, 200, 300)
CovarianceType = Literal["full", "diag"]


@dataclass(frozen=True)
class MixtureFit:
    """Holds the numbers of a fitted mixture."""

    components: int
    nll_fit: float
    """Negative log-likelihood of the fitting set, nats per sample."""
    nll_held_out: float
    """Negative log-likelihood of held-out samples, nats per sample."""
    bic: float
    """Bayesian information criterion of the fitting set; lower is better."""
    largest_mean_norm: float
    """Largest norm of a component's mean: B of the paper's Theorem 2.1, in the space of the samples."""
    smallest_weight: float
    """Weight of the lightest component, in [0, 1]: near 0 where a component has died."""
    converged: bool
    """Whether the likelihood settled before the limit of iterations."""
    iterations: int
    """Iterations of expectation maximisation in the best restart."""


def check_component_counts(component_counts: Sequence[int], samples: int) -> None:
    """Raise ValueError unless all counts differ, are at least 1, and do not exceed the samples of the fitting set."""
    if not component_counts or min(component_counts) < 1 or len(set(component_counts)) < len(component_counts):
        raise ValueError(f"component_counts={list(component_counts)} must be different numbers of at least 1")
    if max(component_counts) > samples:
        raise ValueError(
            f"component_counts={list(component_counts)}: {max(component_counts)} components cannot be fitted to "
            f"{samples} samples. Choose fewer components, or raise per_class or max_samples"
        )


def fit_mixtures(
    train: np.ndarray,
    held_out: np.ndarray,
    component_counts: Sequence[int] = PAPER_COMPONENT_COUNTS,
    covariance_type: CovarianceType = "full",
    restarts: int = 3,
    max_iterations: int = 500,
    seed: int = 0,
    regularization: float = 1e-6,
) -> list[MixtureFit]:
    """Fit scikit-learn's GaussianMixture with each number of components; the best of several restarts counts.

    As many mixtures are fitted at a time as torch has threads. A count gets the same result with any other counts and
    any number of threads.

    Args:
        train: (n, d) float64, the fitting set.
        held_out: (m, d) float64.
        component_counts: numbers of components; the paper's by default.
        covariance_type: a full covariance for each component, or a diagonal one.
        restarts: k-means++ starts; the one with the highest likelihood counts.
        max_iterations: limit of iterations of each restart; reaching it is reported and is not an error.
        seed: seeds the starts.
        regularization: ``reg_covar`` of scikit-learn, added to the variances. With few samples a component may settle
            on one of them, and only this term keeps its likelihood finite: ``smallest_weight`` is then 1 / n, and the
            BIC favours many components. Raise it where that happens, or take more samples.

    Raises:
        ValueError: if there are more components than samples, ``restarts`` is less than 1, or ``regularization`` is not
            above 0.
    """
    check_component_counts(component_counts, len(train))
    if restarts < 1 or regularization <= 0:
        raise ValueError(f"restarts={restarts} must be at least 1, and regularization={regularization} above 0")
    import torch
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    options = {
        "covariance_type": covariance_type,
        "n_init": restarts,
        "max_iter": max_iterations,
        "random_state": seed,
        "reg_covar": regularization,
    }
    largest_first = sorted(component_counts, reverse=True)  # keeps all threads busy
    with (
        threadpool_limits(1, "blas"),
        warnings.catch_warnings(),
        ThreadPoolExecutor(torch.get_num_threads()) as pool,
    ):
        warnings.simplefilter("ignore", ConvergenceWarning)  # MixtureFit.converged reports it
        fits = dict(
            zip(largest_first, pool.map(partial(fit_mixture, train, held_out, options), largest_first), strict=True)
        )
    return [fits[components] for components in component_counts]


def fit_mixture(train: np.ndarray, held_out: np.ndarray, options: dict[str, Any], components: int) -> MixtureFit:
    """Fit one mixture to (n, d) points from k-means++ starts; ``options`` go to scikit-learn."""
    from sklearn.mixture import GaussianMixture

    mixture = GaussianMixture(components, init_params="k-means++", **options).fit(train)
    return MixtureFit(
        components=components,
        nll_fit=float(-mixture.score(train)),
        nll_held_out=float(-mixture.score(held_out)),
        bic=float(mixture.bic(train)),
        largest_mean_norm=float(np.linalg.norm(mixture.means_, axis=1).max()),
        smallest_weight=float(mixture.weights_.min()),
        converged=bool(mixture.converged_),
        iterations=int(mixture.n_iter_),
    )
