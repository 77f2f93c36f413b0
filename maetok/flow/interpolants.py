"""Paths from data (t = 0) to noise (t = 1), and noise and score from a velocity on them."""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor


def over_samples(t: Tensor, like: Tensor) -> Tensor:
    """Reshape ``t`` (B,) so that it multiplies ``like`` (B, ...) sample by sample.

    A scalar tensor () is returned as it is: on the CPU it can multiply tensors of any device, but (1, 1, 1) cannot.
    """
    return t.reshape(t.shape + (1,) * (like.ndim - t.ndim)) if t.ndim else t


class Interpolant(ABC):
    """The path x_t = alpha(t) data + sigma(t) noise (SiT, arXiv 2401.08740, equation 1).

    alpha falls from 1 to 0 and sigma rises from 0 to 1 while t goes from 0 to 1. Coefficients take ``t`` of any shape
    and have its shape, dtype and device. In the other methods ``t`` is (B,) or a scalar tensor (). Other arguments are
    (B, L, C), or have any shape that begins with B; results have that shape and the promoted dtype.
    """

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Return the coefficient of the data, in [0, 1]."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Return the coefficient of the noise, in [0, 1]."""

    @abstractmethod
    def alpha_derivative(self, t: Tensor) -> Tensor:
        """Return the derivative of alpha by t, at most 0."""

    @abstractmethod
    def sigma_derivative(self, t: Tensor) -> Tensor:
        """Return the derivative of sigma by t, at least 0."""

    @abstractmethod
    def time_at_ratio(self, ratio: Tensor) -> Tensor:
        """Return the t in [0, 1) at which sigma / alpha is ``ratio`` >= 0."""

    def wronskian(self, t: Tensor) -> Tensor:
        """Return alpha sigma' - alpha' sigma > 0, the determinant of the map from (data, noise) to (x_t, velocity)."""
        return self.alpha(t) * self.sigma_derivative(t) - self.alpha_derivative(t) * self.sigma(t)

    def interpolate(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return x_t = alpha data + sigma noise."""
        t = over_samples(t, data)
        return self.alpha(t) * data + self.sigma(t) * noise

    def velocity(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the derivative of x_t by t, alpha' data + sigma' noise, which a denoiser learns (SiT, section 2)."""
        t = over_samples(t, data)
        return self.alpha_derivative(t) * data + self.sigma_derivative(t) * noise

    def noise_from_velocity(self, velocity: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Return the noise that ``x`` and ``velocity`` imply: (alpha v - alpha' x) / wronskian."""
        t = over_samples(t, x)
        return (self.alpha(t) * velocity - self.alpha_derivative(t) * x) / self.wronskian(t)

    def score_from_velocity(self, velocity: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Return the gradient of log p_t at ``x``, -noise / sigma (SiT, section 2). It is infinite at t = 0.

        The published formula is ((alpha / alpha') v - x) / (sigma^2 - (alpha / alpha') sigma' sigma). This one is equal
        to it and does not divide by alpha', which is 0 at the ends of some paths.
        """
        return -self.noise_from_velocity(velocity, x, t) / self.sigma(over_samples(t, x))


class LinearInterpolant(Interpolant):
    """Straight path x_t = (1 - t) data + t noise, velocity = noise - data (rectified flow, arXiv 2209.03003)."""

    def alpha(self, t: Tensor) -> Tensor:
        """Return 1 - t."""
        return 1.0 - t

    def sigma(self, t: Tensor) -> Tensor:
        """Return t itself."""
        return t

    def alpha_derivative(self, t: Tensor) -> Tensor:
        """Return -1."""
        return -torch.ones_like(t)

    def sigma_derivative(self, t: Tensor) -> Tensor:
        """Return 1."""
        return torch.ones_like(t)

    def time_at_ratio(self, ratio: Tensor) -> Tensor:
        """Return ratio / (1 + ratio)."""
        return ratio / (1.0 + ratio)


class CosineInterpolant(Interpolant):
    """Variance-preserving path x_t = cos(pi t / 2) data + sin(pi t / 2) noise (SiT's GVP)."""

    def alpha(self, t: Tensor) -> Tensor:
        """Return cos(pi t / 2)."""
        return torch.cos(t * (math.pi / 2))

    def sigma(self, t: Tensor) -> Tensor:
        """Return sin(pi t / 2)."""
        return torch.sin(t * (math.pi / 2))

    def alpha_derivative(self, t: Tensor) -> Tensor:
        """Return -(pi / 2) sin(pi t / 2)."""
        return -(math.pi / 2) * self.sigma(t)

    def sigma_derivative(self, t: Tensor) -> Tensor:
        """Return (pi / 2) cos(pi t / 2)."""
        return (math.pi / 2) * self.alpha(t)

    def time_at_ratio(self, ratio: Tensor) -> Tensor:
        """Return (2 / pi) atan(ratio)."""
        return torch.atan(ratio) * (2 / math.pi)
