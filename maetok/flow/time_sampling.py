"""Distributions of training times. The caller supplies uniform random numbers."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from maetok.flow.interpolants import Interpolant, LinearInterpolant


def shift_time(t: Tensor, shift: float) -> Tensor:
    """Return t' = shift t / (1 + (shift - 1) t), which keeps 0 and 1 (SD3, arXiv 2403.03206, section 5.3.2).

    Args:
        t: times in [0, 1], any shape.
        shift: above 1 moves times towards noise, below 1 towards data. ``1 / shift`` undoes it. Projects in which t = 1
            is data call the same shift ``1 / shift``.

    Returns:
        Times in [0, 1] with the shape and dtype of ``t``.
    """
    return shift * t / (1.0 + (shift - 1.0) * t)


def standard_normal(uniform: Tensor) -> Tensor:
    """Map uniform numbers in [0, 1) to standard normal ones (float64, in about [-5.4, 5.4]) by the quantile function.

    Uniform numbers closer than 2^-25 (half the resolution of float32) to 0 or 1 are moved to that distance, so that 0
    gives a finite number.
    """
    margin = 2.0**-25
    return torch.special.ndtri(uniform.double().clamp(margin, 1.0 - margin))


class TimeSampling(ABC):
    """A distribution of training times.

    Args:
        shift: see `shift_time`; 1 changes nothing.

    Raises:
        ValueError: unless shift > 0.
    """

    def __init__(self, shift: float = 1.0) -> None:
        if not shift > 0.0:
            raise ValueError(f"time shift={shift} must be positive; 1 changes nothing")
        self.shift = shift

    @abstractmethod
    def unshifted(self, uniform: Tensor, interpolant: Interpolant) -> Tensor:
        """Return times (B,) in [0, 1] before the shift, from uniform numbers (B,) in [0, 1). They may be float64."""

    def __call__(self, uniform: Tensor, interpolant: Interpolant | None = None) -> Tensor:
        """Return the times of a training step.

        Args:
            uniform: (B,) float32 or float64 in [0, 1).
            interpolant: the path that the denoiser learns; some distributions depend on it; default linear.

        Returns:
            (B,) in [0, 1], in the dtype of ``uniform``.
        """
        interpolant = interpolant if interpolant is not None else LinearInterpolant()
        return shift_time(self.unshifted(uniform, interpolant), self.shift).to(uniform.dtype)


class UniformTime(TimeSampling):
    """Uniform times (SiT)."""

    def unshifted(self, uniform: Tensor, interpolant: Interpolant) -> Tensor:
        """Return the uniform numbers themselves."""
        return uniform


class LogitNormalTime(TimeSampling):
    """t = sigmoid(mean + std normal) (SD3, arXiv 2403.03206, section 3.1; LightningDiT with mean 0, std 1).

    Args:
        mean: above 0 favours noise.
        std: standard deviation of the normal distribution.
        shift: see `shift_time`.

    Raises:
        ValueError: unless std > 0 and shift > 0.
    """

    def __init__(self, mean: float = 0.0, std: float = 1.0, shift: float = 1.0) -> None:
        super().__init__(shift)
        if not std > 0.0:
            raise ValueError(f"std={std} of {type(self).__name__} must be positive")
        self.mean, self.std = mean, std

    def unshifted(self, uniform: Tensor, interpolant: Interpolant) -> Tensor:
        """Return sigmoid(mean + std normal)."""
        return torch.sigmoid(self.mean + self.std * standard_normal(uniform))


class LogNormalTime(LogitNormalTime):
    """Log-normal noise-to-signal ratio s = sigma / alpha = exp(mean + std normal), as in the published SiT loss.

    On the linear path t = s / (1 + s), which is `LogitNormalTime`; on the cosine path t = (2 / pi) atan(s). The
    published mean and std are 0 and 1; EDM (arXiv 2206.00364) uses -1.2 and 1.2.

    Args:
        mean: mean of log s.
        std: standard deviation of log s.
        shift: see `shift_time`.

    Raises:
        ValueError: unless std > 0 and shift > 0.
    """

    def unshifted(self, uniform: Tensor, interpolant: Interpolant) -> Tensor:
        """Return the time at which sigma / alpha is exp(mean + std normal)."""
        return interpolant.time_at_ratio(torch.exp(self.mean + self.std * standard_normal(uniform)))
