"""Summary of latents without classes: moments per channel, and the number of directions in use."""

from dataclasses import dataclass

import numpy as np

from maetok.formats.channel_moments import ChannelMoments


@dataclass(frozen=True)
class LatentSummary:
    """Holds moments and effective ranks of raw latents as plain numbers, so ``dataclasses.asdict`` fits into JSON."""

    count: int
    """Number of samples."""
    mean: list[float]
    """Mean of each of the C channels over samples and tokens."""
    std: list[float]
    excess_kurtosis: list[float]
    """0 for a normal distribution, -1.2 for a uniform one; 0 where a channel does not vary."""
    effective_rank: float
    """Effective rank of the flattened latents, in [1, L * C]; 0 if nothing varies."""
    effective_rank_of_channels: float
    """Effective rank of the channels over samples and tokens, in [1, C]; 0 if nothing varies."""

    @classmethod
    def of(cls, latents: np.ndarray) -> "LatentSummary":
        """Summarise latents (n, L, C)."""
        channels = latents.reshape(-1, latents.shape[-1])
        moments = ChannelMoments.of(channels)
        return cls(
            count=len(latents),
            mean=moments.mean.tolist(),
            std=moments.std.tolist(),
            excess_kurtosis=[excess_kurtosis(channel) for channel in channels.T],
            effective_rank=effective_rank(latents.reshape(len(latents), -1)),
            effective_rank_of_channels=effective_rank(channels),
        )


def excess_kurtosis(values: np.ndarray) -> float:
    """Return the fourth central moment of values (n,) over the squared variance, less 3; 0 if they do not vary."""
    squares = (values - values.mean(dtype=np.float64)) ** 2
    variance = squares.mean()
    return float((squares**2).mean() / variance**2 - 3.0) if variance > 0 else 0.0


def effective_rank(features: np.ndarray) -> float:
    """Return exp of the entropy of the normalised eigenvalues of the covariance of features (n, d).

    This effective rank is d for an isotropic covariance, 1 if all features lie on a line, and 0 if they do not vary. It
    is at most n - 1. Source: Roy and Vetterli 2007, definition 1.
    """
    centred = features.astype(np.float64)
    centred -= centred.mean(axis=0)
    samples, width = centred.shape
    # Both products have the same nonzero eigenvalues.
    product = centred.T @ centred if width <= samples else centred @ centred.T
    eigenvalues = np.linalg.eigvalsh(product).clip(min=0.0)
    if not eigenvalues.sum():
        return 0.0
    shares = eigenvalues / eigenvalues.sum()
    shares = shares[shares > 0]
    return float(np.exp(-(shares * np.log(shares)).sum()))
