"""Flow matching loss of a denoiser. The caller supplies all random numbers."""

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from maetok.flow.guidance import DenoiserFunction
from maetok.flow.interpolants import Interpolant, LinearInterpolant
from maetok.flow.time_sampling import TimeSampling, UniformTime


class Weighting(ABC):
    """Weight of the squared velocity error as a function of time."""

    @abstractmethod
    def __call__(self, interpolant: Interpolant, t: Tensor) -> Tensor:
        """Return the weights (B,) >= 0 at times (B,) in [0, 1]."""


class UniformWeighting(Weighting):
    """Weight 1 at all times: the plain flow matching loss (SiT)."""

    def __call__(self, interpolant: Interpolant, t: Tensor) -> Tensor:
        """Return ones."""
        return torch.ones_like(t)


class MinSNRWeighting(Weighting):
    """Min-SNR weights (arXiv 2303.09556, section 3.4), converted to velocities of any path.

    The paper weights the squared error of predicted *data* by min(SNR, gamma), SNR = alpha^2 / sigma^2. A velocity
    error e is a data error of sigma e / w with the wronskian w = alpha sigma' - alpha' sigma. The squared velocity
    error therefore has the weight min(SNR, gamma) sigma^2 / w^2 = min(alpha^2, gamma sigma^2) / w^2; w is 1 on the
    linear path and pi / 2 on the cosine path. The weight is 0 at both ends and largest where SNR = gamma.

    Args:
        gamma: largest weight of a data error; the paper's value is 5.

    Raises:
        ValueError: unless gamma > 0.
    """

    def __init__(self, gamma: float = 5.0) -> None:
        if not gamma > 0.0:
            raise ValueError(f"gamma={gamma} of MinSNRWeighting must be positive")
        self.gamma = gamma

    def __call__(self, interpolant: Interpolant, t: Tensor) -> Tensor:
        """Return min(alpha^2, gamma sigma^2) / (alpha sigma' - alpha' sigma)^2."""
        signal, noise = interpolant.alpha(t).square(), interpolant.sigma(t).square()
        return torch.minimum(signal, self.gamma * noise) / interpolant.wronskian(t).square()


class FlowObjective:
    """Mean squared error of the velocity, plus a weighted error of its direction.

    Args:
        interpolant: path from data to noise; default linear (paper).
        time: distribution of training times; default uniform.
        cosine_weight: weight of the mean over tokens of 1 - cosine similarity of predicted and true velocity over the
            channels (LightningDiT, arXiv 2501.01423, section 3.3, which uses 1); 0 omits it.
        weighting: weight of the squared error over time, not of the cosine term; default 1.

    Raises:
        ValueError: if cosine_weight is negative.
    """

    def __init__(
        self,
        interpolant: Interpolant | None = None,
        time: TimeSampling | None = None,
        cosine_weight: float = 0.0,
        weighting: Weighting | None = None,
    ) -> None:
        if cosine_weight < 0.0:
            raise ValueError(f"cosine_weight={cosine_weight} must not be negative")
        self.interpolant = interpolant if interpolant is not None else LinearInterpolant()
        self.time = time if time is not None else UniformTime()
        self.cosine_weight = cosine_weight
        self.weighting = weighting if weighting is not None else UniformWeighting()

    def loss(
        self, denoiser: DenoiserFunction, data: Tensor, noise: Tensor, uniform: Tensor, condition: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the losses at random times.

        Args:
            denoiser: called once, with x_t in the dtype of ``data`` and t in float32.
            data: (B, L, C) normalized latents.
            noise: (B, L, C) standard normal.
            uniform: (B,) float in [0, 1) from which ``time`` makes t.
            condition: of B samples, with the null condition already in place where it is dropped.

        Returns:
            Losses (B,) float32, and the mean of every unweighted term by name, without gradient.

        Raises:
            ValueError: if shapes do not fit.
        """
        t = self.time(uniform, self.interpolant)
        terms = self.terms_at(denoiser, data, noise, t, condition)
        return self._total(terms, t), {name: term.detach().mean() for name, term in terms.items()}

    def losses_at(self, denoiser: DenoiserFunction, data: Tensor, noise: Tensor, t: Tensor, condition: Any) -> Tensor:
        """Return the losses (B,) float32 at given times ``t`` (B,) in [0, 1]; otherwise the same as `loss`."""
        return self._total(self.terms_at(denoiser, data, noise, t, condition), t)

    def terms_at(
        self, denoiser: DenoiserFunction, data: Tensor, noise: Tensor, t: Tensor, condition: Any
    ) -> dict[str, Tensor]:
        """Return the unweighted terms (B,) float32 at times ``t`` (B,).

        They are velocity_mse and, if its weight is positive, cosine_distance.
        """
        if noise.shape != data.shape or t.shape != data.shape[:1]:
            shapes = [tuple(value.shape) for value in (data, noise, t)]
            raise ValueError(f"data, noise and times have shapes {shapes}; expected (B, L, C), (B, L, C) and (B,)")
        t, exact_data, exact_noise = t.float(), data.float(), noise.float()
        x = self.interpolant.interpolate(exact_data, exact_noise, t).to(data.dtype)
        target = self.interpolant.velocity(exact_data, exact_noise, t)
        prediction = denoiser(x, t, condition).float()
        if prediction.shape != target.shape:
            raise ValueError(f"the denoiser returns {tuple(prediction.shape)} for data of shape {tuple(data.shape)}")
        terms = {"velocity_mse": (prediction - target).square().flatten(1).mean(1)}
        if self.cosine_weight:
            distance = 1.0 - F.cosine_similarity(prediction, target, dim=-1)
            terms["cosine_distance"] = distance.flatten(1).mean(1)
        return terms

    def _total(self, terms: dict[str, Tensor], t: Tensor) -> Tensor:
        total = self.weighting(self.interpolant, t.float()) * terms["velocity_mse"]
        if self.cosine_weight:
            total = total + self.cosine_weight * terms["cosine_distance"]
        return total
