"""Latents as points in a few standardised dimensions, in which mixtures are fitted (paper section 4)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from maetok.analysis.arrays import array_api, as_numpy, flattened

if TYPE_CHECKING:
    from maetok.analysis.arrays import Array


@dataclass(frozen=True)
class PrincipalComponents:
    """All principal components of flattened latents, so that the number to keep can be chosen afterwards.

    Exact and in float64: the share of the variance that a number of dimensions explains needs the whole spectrum.
    """

    mean: Any
    """(D,), D = L * C; like all three an array or tensor as what was fitted."""
    directions: Any
    """(R, D) orthonormal rows, the largest variance first; R is the lesser of D and the number of samples."""
    variances: Any
    """(R,) along the directions, of the sample (divided by n - 1)."""

    @classmethod
    def fit(cls, latents: "Array") -> "PrincipalComponents":
        """Principal components of latents (n, L, C) of any float type.

        Raises:
            ValueError: if there are fewer than two samples, or values that are not finite.
        """
        from sklearn.decomposition import PCA

        values = flattened(latents)
        solver = "covariance_eigh" if len(values) >= values.shape[1] else "full"  # whichever matrix is the smaller
        with array_api(values):
            pca = PCA(svd_solver=solver).fit(values)
        return cls(pca.mean_, pca.components_, pca.explained_variance_)

    @property
    def rank(self) -> int:
        """Number of dimensions in which the samples vary by more than rounding."""
        variances = as_numpy(self.variances)
        return int((variances > variances[0] * np.finfo(np.float64).eps * self.directions.shape[1]).sum())

    def explained_variance(self, dimensions: int) -> float:
        """Share of the variance, in [0, 1], that lies in the first ``dimensions`` components."""
        variances = as_numpy(self.variances)
        return float(variances[:dimensions].sum() / variances.sum())

    def dimensions(self, explained_variance: float) -> int:
        """The least number of components that explain more than this share of the variance.

        Raises:
            ValueError: if the share is not between 0 and 1.
        """
        if not 0 < explained_variance < 1:
            raise ValueError(f"explained_variance={explained_variance} must lie between 0 and 1")
        variances = as_numpy(self.variances)
        cumulative = np.cumsum(variances) / variances.sum()
        return min(int(np.searchsorted(cumulative, explained_variance, side="right")) + 1, self.rank)

    def standardised(self, latents: "Array", dimensions: int) -> Any:
        """Latents (n, L, C) -> (n, dimensions) float64; of those that were fitted, mean 0 and standard deviation 1.

        Raises:
            ValueError: if ``dimensions`` is less than 1 or more than those in which the fitted samples vary.
        """
        if not 1 <= dimensions <= self.rank:
            raise ValueError(
                f"dimensions={dimensions} must be 1 ... {self.rank}, the dimensions in which latents vary: "
                "choose fewer, or raise per_class or max_samples"
            )
        directions = self.directions[:dimensions].T
        return (flattened(latents) @ directions - self.mean @ directions) / self.variances[:dimensions] ** 0.5

    def log_scale(self, dimensions: int) -> float:
        """Logarithm of the volume that becomes a unit volume when the first ``dimensions`` are standardised.

        A negative log-likelihood of standardised values (nats) plus this is that of the values before.
        """
        return float(0.5 * np.log(as_numpy(self.variances)[:dimensions]).sum())
