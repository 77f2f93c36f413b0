"""Velocity of a labelled batch, with classifier-free guidance or autoguidance in an interval of times."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

DenoiserFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x (n, L, C), t (n,) in [0, 1], labels (n,) int64) -> velocity (n, L, C)."""


def evaluate(denoiser: DenoiserFunction, x: Tensor, t: float, labels: Tensor) -> Tensor:
    """Velocity (n, L, C), in the dtype of ``x``, of a denoiser that is called in its own dtype.

    That is the dtype of its first floating-point parameter, or float32 if it has none; t is at least float32.
    """
    parameters = denoiser.parameters() if isinstance(denoiser, nn.Module) else iter(())
    dtype = next((parameter.dtype for parameter in parameters if parameter.is_floating_point()), torch.float32)
    times = torch.full((x.shape[0],), t, dtype=torch.promote_types(dtype, torch.float32), device=x.device)
    return denoiser(x.to(dtype), times, labels).to(x.dtype)


class GuidedVelocity:
    """Classifier-free guidance on all channels: v = v_null + scale (v_label - v_null) (arXiv 2207.12598, equation 6).

    Inside the interval the denoiser is called once with 2n rows [labels | null labels], outside it, or with scale 1,
    once with n rows (limited interval: arXiv 2404.07724).

    Args:
        denoiser: (x, t, labels) -> velocity, in evaluation mode.
        labels: (n,) int64 on the denoiser's device.
        scale: at least 1; 1 is no guidance.
        interval: (low, high) in [0, 1], both included, t = 0 being data.
        null_label: label that means "none", the denoiser's ``num_classes``; needed if scale > 1.

    Raises:
        ValueError: if scale, interval, labels or null_label are out of range.
    """

    def __init__(
        self,
        denoiser: DenoiserFunction,
        labels: Tensor,
        scale: float = 1.0,
        interval: tuple[float, float] = (0.0, 1.0),
        null_label: int | None = None,
    ) -> None:
        low, high = interval
        if not 0.0 <= low <= high <= 1.0:
            raise ValueError(f"guidance_interval={tuple(interval)} needs 0 <= low <= high <= 1; t = 0 is data")
        if not scale >= 1.0:
            raise ValueError(f"guidance_scale={scale} must be at least 1, which is no guidance")
        if labels.ndim != 1 or labels.is_floating_point():
            raise ValueError(f"labels must be (n,) integers, got {tuple(labels.shape)} {labels.dtype}")
        self.denoiser, self.labels, self.scale, self.interval = denoiser, labels, scale, (low, high)
        self.both_labels = self._both_labels(null_label)

    @property
    def breaks(self) -> tuple[float, ...]:
        """Times inside (0, 1), descending, at which the velocity jumps: for solvers that choose their steps."""
        return tuple(t for t in sorted({*self.interval}, reverse=True) if 0.0 < t < 1.0) if self.scale > 1.0 else ()

    def active(self, t: float) -> bool:
        """Whether there is guidance at time t: scale > 1 and low <= t <= high."""
        return self.scale > 1.0 and self.interval[0] <= t <= self.interval[1]

    def __call__(self, x: Tensor, t: float, decided_at: float | None = None) -> Tensor:
        """Velocity (n, L, C) at ``x`` (n, L, C), in the dtype of ``x``.

        Args:
            x: (n, L, C), any floating dtype.
            t: time in [0, 1].
            decided_at: time at which the interval is asked, if it is not t (a correction belongs to its step's start).
        """
        if not self.active(t if decided_at is None else decided_at):
            return evaluate(self.denoiser, x, t, self.labels)
        towards, away = self._pair(x, t)
        return away + self.scale * (towards - away)

    def _both_labels(self, null_label: int | None) -> Tensor | None:
        if self.scale == 1.0:
            return None
        if null_label is None:
            raise ValueError(f"guidance_scale={self.scale} needs the null label: the denoiser's num_classes")
        return torch.cat((self.labels, torch.full_like(self.labels, null_label)))

    def _pair(self, x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        assert self.both_labels is not None
        towards, away = evaluate(self.denoiser, torch.cat((x, x)), t, self.both_labels).chunk(2)
        return towards, away


class Autoguidance(GuidedVelocity):
    """Guidance away from a worse denoiser: v = v_guide + scale (v - v_guide) (arXiv 2406.02507, section 3).

    Both get the labels. Inside the interval each is called once with n rows, outside it, or with scale 1, only the
    better one.

    Args:
        denoiser: (x, t, labels) -> velocity, in evaluation mode.
        guide: an earlier or smaller denoiser of the same data.
        labels: (n,) int64.
        scale: at least 1; 1 is no guidance.
        interval: (low, high) in [0, 1], both included, t = 0 being data.

    Raises:
        ValueError: if scale, interval or labels are out of range.
    """

    def __init__(
        self,
        denoiser: DenoiserFunction,
        guide: DenoiserFunction,
        labels: Tensor,
        scale: float = 1.0,
        interval: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        super().__init__(denoiser, labels, scale, interval)
        self.guide = guide

    def _both_labels(self, null_label: int | None) -> None:
        return None

    def _pair(self, x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        return evaluate(self.denoiser, x, t, self.labels), evaluate(self.guide, x, t, self.labels)
