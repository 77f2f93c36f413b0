"""Mean and standard deviation of latents, exact however the samples are divided."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ChannelMoments:
    """Count, mean and sum of squared deviations per channel, in float64."""

    count: int
    mean: np.ndarray
    """(C,)."""
    squared_deviations: np.ndarray
    """(C,), sum over the samples of (value - mean)^2."""

    @classmethod
    def of(cls, values: np.ndarray) -> "ChannelMoments":
        """Statistics over all axes but the last of (..., C)."""
        values = values.reshape(-1, values.shape[-1]).astype(np.float64)
        mean = values.sum(axis=0) / max(len(values), 1)  # 0 of no values, which then add nothing
        return cls(len(values), mean, ((values - mean) ** 2).sum(axis=0))

    def merge(self, other: "ChannelMoments") -> "ChannelMoments":
        """Statistics of both sets together (Chan, Golub and LeVeque 1983, equation 2.1)."""
        if other.count == 0:
            return self
        count = self.count + other.count
        difference = other.mean - self.mean
        mean = self.mean + difference * (other.count / count)
        between = difference**2 * (self.count * other.count / count)
        return ChannelMoments(count, mean, self.squared_deviations + other.squared_deviations + between)

    @property
    def std(self) -> np.ndarray:
        """(C,) standard deviation of the population."""
        return np.sqrt(self.squared_deviations / self.count)
