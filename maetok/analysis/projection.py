"""Projection of latents to a few standardised dimensions, in which mixtures are fitted (paper section 4)."""

from dataclasses import dataclass

import numpy as np


def flattened(latents: np.ndarray) -> np.ndarray:
    """(n, ...) of any float dtype -> (n, d) float64."""
    return latents.reshape(len(latents), -1).astype(np.float64)


@dataclass(frozen=True)
class PrincipalComponents:
    """Holds all principal components of flattened latents, so that the number to keep can be chosen afterwards.

    They are exact and in float64: the share of the variance that some dimensions explain needs the whole spectrum.
    """

    mean: np.ndarray
    """(D,), D = L * C."""
    directions: np.ndarray
    """(R, D) orthonormal rows in order of falling variance; R is the lesser of D and the number of samples."""
    variances: np.ndarray
    """(R,) sample variances along the directions, divided by n - 1."""

    @classmethod
    def fit(cls, latents: np.ndarray) -> "PrincipalComponents":
        """Return the principal components of latents (n, L, C) of any float dtype.

        Raises:
            ValueError: if there are fewer than two samples, or values that are not finite.
        """
        from sklearn.decomposition import PCA

        values = flattened(latents)
        solver = "covariance_eigh" if len(values) >= values.shape[1] else "full"  # decomposes the smaller matrix
        pca = PCA(svd_solver=solver).fit(values)
        return cls(pca.mean_, pca.components_, pca.explained_variance_)

    @property
    def rank(self) -> int:
        """Number of dimensions in which the samples vary by more than rounding."""
        return int((self.variances > self.variances[0] * np.finfo(np.float64).eps * self.directions.shape[1]).sum())

    def explained_variance(self, dimensions: int) -> float:
        """Return the share of the variance, in [0, 1], that lies in the first ``dimensions`` components."""
        return float(self.variances[:dimensions].sum() / self.variances.sum())

    def dimensions(self, explained_variance: float) -> int:
        """Return the least number of components that explain more than this share of the variance.

        Raises:
            ValueError: if the share is not between 0 and 1.
        """
        if not 0 < explained_variance < 1:
            raise ValueError(f"explained_variance={explained_variance} must lie between 0 and 1")
        cumulative = np.cumsum(self.variances) / self.variances.sum()
        return min(int(np.searchsorted(cumulative, explained_variance, side="right")) + 1, self.rank)

    def standardised(self, latents: np.ndarray, dimensions: int) -> np.ndarray:
        """Latents (n, L, C) -> (n, dimensions) float64; the fitted samples get mean 0 and standard deviation 1.

        Raises:
            ValueError: if ``dimensions`` is less than 1 or exceeds :attr:`rank`.
        """
        if not 1 <= dimensions <= self.rank:
            raise ValueError(
                f"dimensions={dimensions} must be 1 ... {self.rank}, the dimensions in which latents vary: "
                "choose fewer, or raise per_class or max_samples"
            )
        directions = self.directions[:dimensions].T
        return (flattened(latents) @ directions - self.mean @ directions) / self.variances[:dimensions] ** 0.5

    def log_scale(self, dimensions: int) -> float:
        """Return the log volume that becomes a unit volume when the first ``dimensions`` are standardised.

        Add it to a negative log-likelihood of standardised values (nats) to get the one of the principal components.
        """
        return float(0.5 * np.log(self.variances[:dimensions]).sum())
