"""Velocity of a batch, with classifier-free guidance or autoguidance in an interval of times.

A condition is what the denoiser accepts: tensors with one row per sample, alone or in tuples and dicts, or None.
It is passed on unread.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

DenoiserFunction = Callable[[Tensor, Tensor, Any], Tensor]
"""(x (n, L, C), t (n,) in [0, 1], condition of n samples) -> velocity (n, L, C)."""


def evaluate(denoiser: DenoiserFunction, x: Tensor, t: float, condition: Any) -> Tensor:
    """Return the velocity (n, L, C), in the dtype of ``x``, of a denoiser that is called in its own dtype.

    Its own dtype is the dtype of its first floating-point parameter, or float32 if it has none; t is at least float32.
    """
    parameters = denoiser.parameters() if isinstance(denoiser, nn.Module) else iter(())
    dtype = next((parameter.dtype for parameter in parameters if parameter.is_floating_point()), torch.float32)
    times = torch.full((x.shape[0],), t, dtype=torch.promote_types(dtype, torch.float32), device=x.device)
    return denoiser(x.to(dtype), times, condition).to(x.dtype)


def concatenated(condition: Any, null_condition: Any) -> Any:
    """Return the condition of 2n rows: n with ``condition``, then n with the null condition.

    A single number or tensor () in ``null_condition`` stands for all n rows.
    """

    def join(value: Tensor, null: Any) -> Tensor:
        return torch.cat((value, torch.as_tensor(null, dtype=value.dtype, device=value.device).expand_as(value)))

    return tree_map(join, condition, null_condition)


class GuidedVelocity:
    """Classifier-free guidance on all channels: v = v_null + scale (v - v_null) (arXiv 2207.12598, equation 6).

    Inside the interval the denoiser is called once with 2n rows [conditions | null conditions]. Outside the interval,
    or with scale 1, it is called once with n rows (limited interval: arXiv 2404.07724).

    Args:
        denoiser: (x, t, condition) -> velocity, in evaluation mode.
        condition: of n samples, on the denoiser's device.
        scale: at least 1; 1 disables guidance.
        interval: (low, high) in [0, 1], both included; t = 0 is data.
        null_condition: the denoiser's ``without_condition(condition)``, or a single value for all rows, such as a null
            label; needed if scale > 1.

    Raises:
        ValueError: if scale or interval is out of range, or the null condition is missing.
    """

    def __init__(
        self,
        denoiser: DenoiserFunction,
        condition: Any,
        scale: float = 1.0,
        interval: tuple[float, float] = (0.0, 1.0),
        null_condition: Any = None,
    ) -> None:
        low, high = interval
        if not 0.0 <= low <= high <= 1.0:
            raise ValueError(f"guidance_interval={tuple(interval)} needs 0 <= low <= high <= 1; t = 0 is data")
        if not scale >= 1.0:
            raise ValueError(f"guidance_scale={scale} must be at least 1; 1 disables guidance")
        self.denoiser, self.condition, self.scale, self.interval = denoiser, condition, scale, (low, high)
        self.both_conditions = self._both_conditions(null_condition)

    @property
    def breaks(self) -> tuple[float, ...]:
        """Return the times inside (0, 1), descending, at which the velocity jumps. Adaptive solvers stop there."""
        return tuple(t for t in sorted({*self.interval}, reverse=True) if 0.0 < t < 1.0) if self.scale > 1.0 else ()

    def active(self, t: float) -> bool:
        """Return whether guidance is active at time t: scale > 1 and low <= t <= high."""
        return self.scale > 1.0 and self.interval[0] <= t <= self.interval[1]

    def __call__(self, x: Tensor, t: float, decided_at: float | None = None) -> Tensor:
        """Return the velocity (n, L, C) at ``x`` (n, L, C), in the dtype of ``x``.

        Args:
            x: (n, L, C), any floating dtype.
            t: time in [0, 1].
            decided_at: time that decides whether guidance is active; t if not given. Heun's correction passes the
                start of its step.
        """
        if not self.active(t if decided_at is None else decided_at):
            return evaluate(self.denoiser, x, t, self.condition)
        towards, away = self._pair(x, t)
        return away + self.scale * (towards - away)

    def _both_conditions(self, null_condition: Any) -> Any:
        if self.scale == 1.0:
            return None
        if null_condition is None:
            raise ValueError(
                f"guidance_scale={self.scale} needs the null condition: the denoiser's without_condition(condition)"
            )
        return concatenated(self.condition, null_condition)

    def _pair(self, x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        towards, away = evaluate(self.denoiser, torch.cat((x, x)), t, self.both_conditions).chunk(2)
        return towards, away


class Autoguidance(GuidedVelocity):
    """Guidance away from a worse denoiser: v = v_guide + scale (v - v_guide) (arXiv 2406.02507, section 3).

    Both get the condition. Inside the interval each is called once with n rows. Outside the interval, or with scale 1,
    only the better one is called.

    Args:
        denoiser: (x, t, condition) -> velocity, in evaluation mode.
        guide: an earlier or smaller denoiser of the same data.
        condition: of n samples.
        scale: at least 1; 1 disables guidance.
        interval: (low, high) in [0, 1], both included; t = 0 is data.

    Raises:
        ValueError: if scale or interval is out of range.
    """

    def __init__(
        self,
        denoiser: DenoiserFunction,
        guide: DenoiserFunction,
        condition: Any,
        scale: float = 1.0,
        interval: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        super().__init__(denoiser, condition, scale, interval)
        self.guide = guide

    def _both_conditions(self, null_condition: Any) -> None:
        return None

    def _pair(self, x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        return evaluate(self.denoiser, x, t, self.condition), evaluate(self.guide, x, t, self.condition)
