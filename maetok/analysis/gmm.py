"""Gaussian mixtures: how many modes a set of points has (paper section 4)."""

import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from maetok.analysis.arrays import array_api, as_numpy, like

if TYPE_CHECKING:
    from maetok.analysis.arrays import Array

PAPER_COMPONENT_COUNTS = (5, 10, 50, 100, 200, 300)
CovarianceType = Literal["full", "diag"]


@dataclass(frozen=True)
class MixtureFit:
    """What a mixture of one number of components came to."""

    components: int
    nll_fit: float
    """Negative log-likelihood of the fitting set, nats per sample."""
    nll_held_out: float
    """The same of samples that were not fitted."""
    bic: float
    """Bayesian information criterion of the fitting set; the lower the better."""
    largest_mean_norm: float
    """Largest norm of a component's mean: B of the paper's Theorem 2.1, in the space of the samples."""
    smallest_weight: float
    """Weight of the lightest component, in [0, 1]: near 0 where a component has died."""
    converged: bool
    """Whether the likelihood had settled before the limit of iterations."""
    iterations: int
    """Iterations of expectation maximisation in the best restart."""


def check_component_counts(component_counts: Sequence[int], samples: int) -> None:
    """Raise ValueError unless every count is at least 1 and no more than the samples of the fitting set."""
    if not component_counts or min(component_counts) < 1 or len(set(component_counts)) < len(component_counts):
        raise ValueError(f"component_counts={list(component_counts)} must be different numbers of at least 1")
    if max(component_counts) > samples:
        raise ValueError(
            f"component_counts={list(component_counts)}: {max(component_counts)} components cannot be fitted to "
            f"{samples} samples. Choose fewer components, or raise per_class or max_samples"
        )


def fit_mixtures(
    train: "Array",
    held_out: "Array",
    component_counts: Sequence[int] = PAPER_COMPONENT_COUNTS,
    covariance_type: CovarianceType = "full",
    restarts: int = 3,
    max_iterations: int = 500,
    seed: int = 0,
    regularization: float = 1e-6,
) -> list[MixtureFit]:
    """Fit a mixture of each number of components, the best of several restarts, by scikit-learn's GaussianMixture.

    The results are those of ``GaussianMixture(init_params="k-means++", n_init=restarts, random_state=seed)``. Its own
    k-means++ knows no tensors, so the starts are computed here, on the CPU, and given to it; the iterations run where
    the samples are. On the CPU as many fits run at a time as torch has threads. A count gets the same result whatever
    other counts and however many threads there are.

    Args:
        train: (n, d) float64 to fit, a numpy array or a tensor on any device.
        held_out: (m, d) float64, of the same kind.
        component_counts: numbers of components; those of the paper by default.
        covariance_type: a full covariance for each component, or a diagonal one.
        restarts: starts of which the one with the highest likelihood counts.
        max_iterations: limit of iterations of each; stopping there is reported, not an error.
        seed: of the starts.
        regularization: added to the variances; ``reg_covar`` of scikit-learn. With few samples a component may settle
            on one of them, and only this keeps it from being infinitely likely: ``smallest_weight`` is then 1 / n, and
            the BIC favours many components. Raise it where that happens, or take more samples.

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

    points = as_numpy(train)
    starts = [  # the longest first, to keep all threads busy
        means
        for components in sorted(component_counts, reverse=True)
        for means in start_means(points, components, restarts, seed)
    ]
    fit = partial(fit_mixture, train, covariance_type, max_iterations, regularization)
    threads = torch.get_num_threads() if isinstance(train, np.ndarray) else 1
    with threadpool_limits(1, "blas"), warnings.catch_warnings(), ThreadPoolExecutor(threads) as pool:
        warnings.simplefilter("ignore", ConvergenceWarning)  # reported as MixtureFit.converged
        fitted = list(pool.map(fit, starts))
    best = (
        max((one for one in fitted if one.n_components == components), key=lambda one: one.lower_bound_)
        for components in component_counts
    )
    return [measure(mixture, train, held_out) for mixture in best]


def start_means(points: np.ndarray, components: int, restarts: int, seed: int) -> list[np.ndarray]:
    """For each restart, ``components`` of the points (n, d), chosen by k-means++."""
    from sklearn.cluster import kmeans_plusplus

    random = np.random.RandomState(seed)
    return [kmeans_plusplus(points, components, random_state=random)[0] for _ in range(restarts)]


def fit_mixture(
    train: "Array", covariance_type: CovarianceType, max_iterations: int, regularization: float, means: np.ndarray
) -> Any:
    """A GaussianMixture fitted from means (K, d), equally likely at first and as narrow as ``regularization`` lets.

    So does scikit-learn begin with ``init_params="k-means++"``: each sample belongs to the nearest mean.
    """
    from sklearn.mixture import GaussianMixture

    components, dimensions = means.shape
    precisions = np.full(means.shape, 1 / regularization)
    if covariance_type == "full":
        precisions = np.tile(np.eye(dimensions) / regularization, (components, 1, 1))
    mixture = GaussianMixture(
        components,
        covariance_type=covariance_type,
        max_iter=max_iterations,
        reg_covar=regularization,
        weights_init=like(np.full(components, 1 / components), train),
        means_init=like(means, train),
        precisions_init=like(precisions, train),
        init_params="random_from_data",  # not used, but k-means++ is refused for tensors
    )
    with array_api(train):
        return mixture.fit(train)


def measure(mixture: Any, train: "Array", held_out: "Array") -> MixtureFit:
    """The numbers of a fitted mixture."""
    with array_api(train):
        nll_fit, nll_held_out, bic = -mixture.score(train), -mixture.score(held_out), mixture.bic(train)
    return MixtureFit(
        components=mixture.n_components,
        nll_fit=float(nll_fit),
        nll_held_out=float(nll_held_out),
        bic=float(bic),
        largest_mean_norm=float(np.linalg.norm(as_numpy(mixture.means_), axis=1).max()),
        smallest_weight=float(as_numpy(mixture.weights_).min()),
        converged=bool(mixture.converged_),
        iterations=int(mixture.n_iter_),
    )
