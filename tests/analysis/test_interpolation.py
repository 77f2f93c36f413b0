"""Midpoints of latents, with decoders that have known results."""

import pytest
import torch
from torch import Tensor

from maetok.analysis.interpolation import interpolated, midpoint_errors


def test_points_between_are_evenly_spaced_and_without_the_ends() -> None:
    first, second = torch.zeros(2, 1, 2), torch.tensor([[[4.0, 8.0]], [[0.0, -4.0]]])
    between = interpolated(first, second, 3)
    assert between.shape == (2, 3, 1, 2)
    assert between[0, :, 0].tolist() == [[1, 2], [2, 4], [3, 6]]
    assert between[1, :, 0].tolist() == [[0, -1], [0, -2], [0, -3]]


def test_midpoints_of_a_linear_tokenizer_are_latents_of_cross_fades() -> None:
    first, second = (torch.randint(-8, 8, (5, 3, 4)) / 8 for _ in range(2))  # exact in floating point

    def decode(latents: Tensor) -> Tensor:
        return (latents / 2).unflatten(2, (2, 2))

    errors = midpoint_errors(lambda images: images.flatten(2) * 2, decode, first, second)
    assert (errors.cycle_error, errors.cycle_error_of_ends, errors.pixel_change) == (0, 0, 1)


def test_errors_of_a_square_by_hand() -> None:
    """D squares, E is the identity. Pairs (1, 3) and (-3, 3): midpoints 2 and 0, images 4 and 0, ends 1, 9 and 9, 9."""
    first, second = torch.tensor([[[1.0]], [[-3.0]]]), torch.tensor([[[3.0]], [[3.0]]])
    errors = midpoint_errors(lambda images: images, torch.square, first, second)
    assert errors.cycle_error == pytest.approx((2 + 0) / (1 + 3))
    assert errors.cycle_error_of_ends == pytest.approx((0 + 6 + 12 + 6) / 2 / (1 + 3))
    assert errors.pixel_change == pytest.approx((3 + 5 + 9 + 9) / (8 + 0))
