"""Latents from noise and conditions, and noise that depends only on the index of a sample."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from maetok.flow.guidance import Autoguidance, DenoiserFunction, GuidedVelocity
from maetok.flow.interpolants import Interpolant
from maetok.flow.solvers import Euler, Solver, StepNoise


@torch.no_grad()
def sample(
    denoiser: DenoiserFunction,
    condition: Any,
    noise: Tensor,
    solver: Solver | None = None,
    steps: int | None = None,
    guidance_scale: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    guide: DenoiserFunction | None = None,
    null_condition: Any = None,
    step_noise: StepNoise | None = None,
    interpolant: Interpolant | None = None,
) -> Tensor:
    """Sample normalized latents.

    Args:
        denoiser: (x (n, L, C), t (n,), condition) -> velocity (n, L, C), in evaluation mode; see `GuidedVelocity`.
        condition: of n samples, as the denoiser takes it: labels (n,) int64 for the denoisers of this suite.
        noise: (n, L, C) standard normal, for instance ``index_noise(seed, indices, shape=(L, C))``.
        solver: default `Euler` with 250 steps.
        steps: number of steps; the solver's own if not given.
        guidance_scale: at least 1; 1 disables guidance and costs n rows per call.
        guidance_interval: (low, high) in [0, 1], both included; t = 0 is data. The paper uses [0, 0.65 to 0.75].
        guide: an earlier or smaller denoiser that guides instead of the null condition.
        null_condition: default the denoiser's ``without_condition(condition)``; a single value stands for all rows.
        step_noise: step -> (n, L, C), for stochastic solvers, for instance
            ``lambda step: index_noise(seed, indices, step, (L, C))``.
        interpolant: the path on which the denoiser was trained, for stochastic solvers; default linear.

    Returns:
        (n, L, C) in the dtype of ``noise``, without gradient.

    Raises:
        ValueError: if shapes do not fit, a number is out of range, or a needed argument is missing.
    """
    rows = {len(value) for value in tree_leaves(condition) if isinstance(value, Tensor)}
    if rows - {len(noise)}:
        raise ValueError(f"condition and noise differ in the number of samples: {sorted(rows)} and {len(noise)}")
    if guide is not None:
        velocity: GuidedVelocity = Autoguidance(denoiser, guide, condition, guidance_scale, guidance_interval)
    else:
        if null_condition is None and guidance_scale > 1.0 and hasattr(denoiser, "without_condition"):
            null_condition = denoiser.without_condition(condition)
        velocity = GuidedVelocity(denoiser, condition, guidance_scale, guidance_interval, null_condition)
    solver = solver if solver is not None else Euler()
    solver = solver if steps is None else solver.with_steps(steps)
    return solver(velocity, noise, step_noise, interpolant).to(noise.dtype)


def index_noise(
    seed: int,
    indices: Tensor | Sequence[int],
    step: int = -1,
    shape: Sequence[int] = (),
    device: torch.device | str | None = None,
) -> Tensor:
    """Return standard normal noise that is a function of (seed, index, step, place) alone.

    So a sample is the same in any batch, in any order and with any number of processes. On another device only the
    last bit of logarithm and cosine may differ. Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy
    as 1, 2, 3") gives integers: the seed is its key, (place, step, index) its counter. Box-Muller in float64 makes
    them normal.

    Args:
        seed: in [0, 2^64).
        indices: n indices of samples in [0, 2^63).
        step: -1 for the noise that sampling starts from, k >= 0 for the noise of a solver's step k.
        shape: shape of one sample, (L, C).
        device: the device of ``indices`` if not given, or the CPU.

    Returns:
        (n, *shape) float32, at most 6.8 in size.

    Raises:
        ValueError: if seed, step or an index is out of range.
    """
    index = torch.as_tensor(indices, dtype=torch.int64, device=device).reshape(-1, 1)
    if not 0 <= seed < 2**64 or not -1 <= step < 2**32 - 1:
        raise ValueError(f"seed={seed} must lie in [0, 2^64) and step={step} in [-1, 2^32 - 2]")
    if index.device.type == "cpu" and (index < 0).any():  # asking a GPU would wait for it
        raise ValueError("indices of samples must not be negative")
    size = math.prod(shape)
    place = torch.arange((size + 3) // 4, device=index.device)[None]
    words = philox((place, torch.full_like(place, step + 1), index & WORD, index >> 32), (seed & WORD, seed >> 32))
    normal = []
    for first, second in ((words[0], words[1]), (words[2], words[3])):
        radius = torch.sqrt(-2.0 * torch.log((first.double() + 0.5) / 2.0**32))  # never log 0
        angle = second.double() * (2.0 * math.pi / 2.0**32)
        normal += [radius * torch.cos(angle), radius * torch.sin(angle)]
    return torch.stack(normal, dim=-1).flatten(1)[:, :size].float().reshape(-1, *shape)


WORD = 2**32 - 1


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox 4x32 with 10 rounds.

    Args:
        counter: four int64 tensors with values in [0, 2^32), of shapes that broadcast.
        key: two integers in [0, 2^32).

    Returns:
        Four int64 tensors with values in [0, 2^32).
    """
    a, b, c, d = counter
    first, second = key
    for _ in range(10):
        low, high = a * 0xD2511F53, c * 0xCD9E8D57  # the product wraps at 2^64; its upper half is read without the sign
        a, b, c, d = ((high >> 32) & WORD) ^ b ^ first, high & WORD, ((low >> 32) & WORD) ^ d ^ second, low & WORD
        first, second = (first + 0x9E3779B9) & WORD, (second + 0xBB67AE85) & WORD
    return a, b, c, d
