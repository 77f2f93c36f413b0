"""Tests whether points between latents are latents of images, by decoding and encoding them again."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def interpolated(first: Tensor, second: Tensor, steps: int) -> Tensor:
    """Return latents (P, steps, L, C) on straight lines between pairs (P, L, C), evenly spaced, without the ends."""
    shares = torch.arange(1, steps + 1, device=first.device, dtype=first.dtype) / (steps + 1)
    return torch.lerp(first[:, None], second[:, None], shares[:, None, None])


@dataclass(frozen=True)
class MidpointErrors:
    """Holds errors of the midpoints between latents; distances are summed over all pairs before they are divided."""

    cycle_error: float
    """|E(D(m)) - m| relative to |z_a - z_b| / 2 for the midpoint m of z_a and z_b.

    0: the midpoint is the latent of its own decoded image. 1: encoding lands as far from it as the ends are."""
    cycle_error_of_ends: float
    """The same error of z_a and z_b in the same unit: the error of the tokenizer at latents of real images."""
    pixel_change: float
    """(|D(m) - D(z_a)| + |D(m) - D(z_b)|) / |D(z_a) - D(z_b)| in L1, at least 1.

    1: every pixel of the midpoint's image lies between the pixels of the ends, as in a cross-fade. More than 1: it
    shows something that neither end has."""


def midpoint_errors(
    encode: Callable[[Tensor], Tensor], decode: Callable[[Tensor], Tensor], first: Tensor, second: Tensor
) -> MidpointErrors:
    """Return the errors of the midpoints between latents of pairs of images.

    Args:
        encode: E, images (P, 3, H, W) in [-1, 1] -> latents (P, L, C).
        decode: D, latents (P, L, C) -> images (P, 3, H, W).
        first: latents (P, L, C).
        second: latents (P, L, C) of other images.

    Returns:
        The errors; NaN where the ends of all pairs are the same.
    """
    middle = (first + second) / 2
    picture, first_picture, second_picture = decode(middle), decode(first), decode(second)

    def distance(a: Tensor, b: Tensor, order: int) -> Tensor:
        return torch.linalg.vector_norm((a - b).flatten(1).double(), order, dim=1).sum()

    half = distance(first, second, 2) / 2
    ends = distance(encode(first_picture), first, 2) + distance(encode(second_picture), second, 2)
    way = distance(picture, first_picture, 1) + distance(picture, second_picture, 1)
    return MidpointErrors(
        cycle_error=float(distance(encode(picture), middle, 2) / half),
        cycle_error_of_ends=float(ends / 2 / half),
        pixel_change=float(way / distance(first_picture, second_picture, 1)),
    )
