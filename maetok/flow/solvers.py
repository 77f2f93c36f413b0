"""Solvers from noise (t = 1) to data (t = 0): Euler, Heun, Euler-Maruyama and adaptive Dormand-Prince."""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import pairwise
from typing import Protocol, Self

import torch
from torch import Tensor

from maetok.flow.interpolants import Interpolant, LinearInterpolant
from maetok.flow.time_sampling import shift_time

StepNoise = Callable[[int], Tensor]
"""Index of a step, from 0 on -> standard normal noise (n, L, C)."""


class VelocityField(Protocol):
    """The field that a solver integrates, for instance a `GuidedVelocity`.

    Its arguments are the state (n, L, C) float64, the time, and the time that decides whether guidance is active, if
    that differs. A field with jumps in time may list them, descending, as ``breaks``.
    """

    def __call__(self, x: Tensor, t: float, decided_at: float | None = None, /) -> Tensor:
        """Return the velocity, with the shape and dtype of ``x``."""


def time_grid(steps: int, shift: float = 1.0, last: float = 0.0) -> list[float]:
    """Return the times of ``steps`` steps from 1 to 0: steps + 1 numbers, evenly spaced before the shift.

    Args:
        steps: number of steps, at least 1.
        shift: see `shift_time`; above 1 puts more times near noise.
        last: if positive, the last step begins there and the other steps divide [last, 1] in the same way.
    """
    if last == 0.0:
        return shift_time(torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64), shift).tolist()
    end = shift_time(torch.tensor(last, dtype=torch.float64), 1.0 / shift).item()
    return [*shift_time(torch.linspace(1.0, end, steps, dtype=torch.float64), shift).tolist(), 0.0]


class Solver(ABC):
    """A method of integration. The state is float64, independent of the denoiser's dtype."""

    @abstractmethod
    def __call__(
        self,
        velocity: VelocityField,
        noise: Tensor,
        step_noise: StepNoise | None = None,
        interpolant: Interpolant | None = None,
    ) -> Tensor:
        """Integrate from t = 1 to t = 0.

        Args:
            velocity: the field, called with float64 states.
            noise: (n, L, C) standard normal, any floating dtype.
            step_noise: noise of each step; only stochastic solvers use it.
            interpolant: the path on which the velocity was learned; only stochastic solvers use it; default linear.

        Returns:
            (n, L, C) float64.

        Raises:
            ValueError: if a stochastic solver gets no ``step_noise``.
        """

    @abstractmethod
    def with_steps(self, steps: int) -> Self:
        """Return the same solver with another number of steps.

        Raises:
            ValueError: if the solver has no number of steps, or steps < 1.
        """


class FixedStepSolver(Solver):
    """A solver with a fixed grid of times.

    Args:
        steps: number of steps; the paper uses 250.
        shift: shift of the grid, see `shift_time`.

    Raises:
        ValueError: unless steps >= 1 and shift > 0.
    """

    def __init__(self, steps: int = 250, shift: float = 1.0) -> None:
        if steps < 1:
            raise ValueError(f"steps={steps} of the solver must be at least 1")
        if not shift > 0.0:
            raise ValueError(f"time shift={shift} must be positive; 1 changes nothing")
        self.steps, self.shift = steps, shift

    def with_steps(self, steps: int) -> Self:
        """Return the same solver with another number of steps."""
        if steps < 1:
            raise ValueError(f"steps={steps} of the solver must be at least 1")
        other = copy.copy(self)
        other.steps = steps
        return other


class Euler(FixedStepSolver):
    """Explicit Euler of the probability flow ODE, order 1. Each step calls the velocity once."""

    def __call__(
        self,
        velocity: VelocityField,
        noise: Tensor,
        step_noise: StepNoise | None = None,
        interpolant: Interpolant | None = None,
    ) -> Tensor:
        """Integrate from t = 1 to t = 0; see `Solver`."""
        x = noise.double()
        for t, following in pairwise(time_grid(self.steps, self.shift)):
            x = x + (following - t) * velocity(x, t)
        return x


class Heun(FixedStepSolver):
    """Heun's method of the probability flow ODE, order 2 (EDM, arXiv 2206.00364, algorithm 1).

    As published, the last step, which ends in data, is an Euler step; its own error is of order 2 as well. A correction
    is guided if the start of its step is inside the guidance interval. It calls the velocity 2 steps - 1 times.
    """

    def __call__(
        self,
        velocity: VelocityField,
        noise: Tensor,
        step_noise: StepNoise | None = None,
        interpolant: Interpolant | None = None,
    ) -> Tensor:
        """Integrate from t = 1 to t = 0; see `Solver`."""
        x = noise.double()
        for t, following in pairwise(time_grid(self.steps, self.shift)):
            slope = velocity(x, t)
            predicted = x + (following - t) * slope
            if following > 0.0:
                predicted = x + (following - t) * 0.5 * (slope + velocity(predicted, following, t))
            x = predicted
        return x


class EulerMaruyama(FixedStepSolver):
    """Euler-Maruyama of the reverse SDE dx = (v - t score) dt + sqrt(2 t) dw (SiT, arXiv 2401.08740, section 2).

    As published, the diffusion coefficient is 2 t on every path, and the last step, from ``last`` to 0, adds no noise.
    Step k < steps - 1 adds ``step_noise(k)``. Each step calls the velocity once.

    Args:
        steps: number of steps, including the last one.
        shift: shift of the grid, see `shift_time`; it does not move ``last``.
        last: time in (0, 1) at which the last step begins.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(self, steps: int = 250, shift: float = 1.0, last: float = 0.04) -> None:
        super().__init__(steps, shift)
        if not 0.0 < last < 1.0:
            raise ValueError(f"last={last} of EulerMaruyama must lie in (0, 1)")
        self.last = last

    def __call__(
        self,
        velocity: VelocityField,
        noise: Tensor,
        step_noise: StepNoise | None = None,
        interpolant: Interpolant | None = None,
    ) -> Tensor:
        """Integrate from t = 1 to t = 0; see `Solver`."""
        if step_noise is None:
            raise ValueError("EulerMaruyama needs step_noise: step -> (n, L, C), for instance made by index_noise")
        path = interpolant if interpolant is not None else LinearInterpolant()
        x = noise.double()
        for step, (t, following) in enumerate(pairwise(time_grid(self.steps, self.shift, self.last))):
            v = velocity(x, t)
            score = path.score_from_velocity(v, x, torch.tensor(t, dtype=torch.float64))
            x = x + (following - t) * (v - t * score)
            if following > 0.0:
                x = x + math.sqrt(2.0 * t * (t - following)) * step_noise(step).to(x)
        return x


class Dopri5(Solver):
    """Dormand-Prince 5(4) with adaptive steps, from torchdiffeq; default tolerances follow SiT.

    A step is accepted if the error of every sample is within tolerance. No step crosses an edge of a guidance interval.
    Steps depend on all samples of a batch, so a picture is the same in any batch only within tolerance. The denoiser
    should be float32: the rounding errors of bfloat16 exceed the tolerance and make steps tiny.

    Args:
        rtol: relative tolerance.
        atol: absolute tolerance.

    Raises:
        ValueError: unless both are positive.
    """

    def __init__(self, rtol: float = 1e-3, atol: float = 1e-6) -> None:
        if not (rtol > 0.0 and atol > 0.0):
            raise ValueError(f"rtol={rtol} and atol={atol} of Dopri5 must be positive")
        self.rtol, self.atol = rtol, atol

    def __call__(
        self,
        velocity: VelocityField,
        noise: Tensor,
        step_noise: StepNoise | None = None,
        interpolant: Interpolant | None = None,
    ) -> Tensor:
        """Integrate from t = 1 to t = 0; see `Solver`."""
        from torchdiffeq import odeint  # type: ignore[import-untyped]

        x = noise.double()
        for start, end in pairwise((1.0, *getattr(velocity, "breaks", ()), 0.0)):
            middle = (start + end) / 2  # decides on which side of the guidance interval's edges this piece lies

            def slope(t: Tensor, state: Tensor, middle: float = middle) -> Tensor:
                return velocity(state, t.item(), middle)

            ends = torch.tensor((start, end), dtype=torch.float64, device=x.device)
            options = {"norm": _largest_rms}
            x = odeint(slope, x, ends, rtol=self.rtol, atol=self.atol, method="dopri5", options=options)[-1]
        return x

    def with_steps(self, steps: int) -> Self:
        """Refuse, because the tolerances decide the number of steps."""
        raise ValueError(f"steps={steps} means nothing to Dopri5: set its rtol and atol, or use another solver")


def _largest_rms(errors: Tensor) -> Tensor:
    """Return the largest root mean square of the samples (n, ...)."""
    return errors.flatten(1).square().mean(1).sqrt().max()
