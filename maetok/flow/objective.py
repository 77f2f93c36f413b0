"""Flow matching loss of a denoiser; time and noise are functions of what the caller supplies."""

from abc import ABC, abstractmethod

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
        """Weights (B,) >= 0 at times (B,) in [0, 1]."""


class UniformWeighting(Weighting):
    """Weight 1 at all times: the plain flow matching loss (SiT)."""

    def __call__(self, interpolant: Interpolant, t: Tensor) -> Tensor:
        """Ones."""
        return torch.ones_like(t)


class MinSNRWeighting(Weighting):
    """Min-SNR weights (arXiv 2303.09556, section 3.4), carried over to velocities of any path.

    There the squared error of predicted *data* has weight min(SNR, gamma), SNR = alpha^2 / sigma^2. A velocity error e
    is a data error of sigma e / w with the wronskian w = alpha sigma' - alpha' sigma, hence the weight
    min(SNR, gamma) sigma^2 / w^2 = min(alpha^2, gamma sigma^2) / w^2 of the squared velocity error; w is 1 on the
    linear path and pi / 2 on the cosine path. It is 0 at both ends and largest where SNR = gamma.

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
        """min(alpha^2, gamma sigma^2) / (alpha sigma' - alpha' sigma)^2."""
        signal, noise = interpolant.alpha(t).square(), interpolant.sigma(t).square()
        return torch.minimum(signal, self.gamma * noise) / interpolant.wronskian(t).square()


class FlowObjective:
    """Mean squared error of the velocity, and how far its direction is off.

    Args:
        interpolant: path from data to noise; default linear (paper).
        time: distribution of training times; default uniform.
        cosine_weight: weight of the mean over tokens of 1 - cosine similarity of predicted and true velocity over the
            channels (LightningDiT, arXiv 2501.01423, section 3.3, which uses 1); 0 leaves it out.
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
        self, denoiser: DenoiserFunction, data: Tensor, noise: Tensor, uniform: Tensor, labels: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses at random times.

        Args:
            denoiser: called once, with x_t in the dtype of ``data`` and t in float32.
            data: (B, L, C) normalized latents.
            noise: (B, L, C) standard normal.
            uniform: (B,) float in [0, 1) from which ``time`` makes t.
            labels: (B,) int64, already replaced by the null label where it is dropped.

        Returns:
            Losses (B,) float32, and the mean of every unweighted term by name, without gradient.

        Raises:
            ValueError: if shapes do not fit.
        """
        t = self.time(uniform, self.interpolant)
        terms = self.terms_at(denoiser, data, noise, t, labels)
        return self._total(terms, t), {name: term.detach().mean() for name, term in terms.items()}

    def losses_at(self, denoiser: DenoiserFunction, data: Tensor, noise: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Losses (B,) float32 at given times ``t`` (B,) in [0, 1], such as a validation's bins; else as `loss`."""
        return self._total(self.terms_at(denoiser, data, noise, t, labels), t)

    def terms_at(
        self, denoiser: DenoiserFunction, data: Tensor, noise: Tensor, t: Tensor, labels: Tensor
    ) -> dict[str, Tensor]:
        """Unweighted terms (B,) float32 at times ``t`` (B,): velocity_mse and, if it counts, cosine_distance."""
        rows = data.shape[0]
        if noise.shape != data.shape or t.shape != (rows,) or labels.shape != (rows,):
            shapes = [tuple(value.shape) for value in (data, noise, t, labels)]
            raise ValueError(f"data, noise, times and labels have shapes {shapes}; want (B, L, C) twice and (B,) twice")
        t, exact_data, exact_noise = t.float(), data.float(), noise.float()
        x = self.interpolant.interpolate(exact_data, exact_noise, t).to(data.dtype)
        target = self.interpolant.velocity(exact_data, exact_noise, t)
        prediction = denoiser(x, t, labels).float()
        if prediction.shape != target.shape:
            raise ValueError(f"denoiser gives {tuple(prediction.shape)} for data of shape {tuple(data.shape)}")
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
