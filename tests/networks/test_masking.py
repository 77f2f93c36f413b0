"""Mask ratios follow their distributions, and masks have exactly the wanted size."""

import pytest
import torch
from scipy.stats import truncnorm

from maetok.networks import MaskRatio, random_mask


def test_uniform_ratio() -> None:
    uniform = torch.tensor([0.0, 0.5, 0.999])
    torch.testing.assert_close(MaskRatio(0.4, 0.6)(uniform), torch.tensor([0.4, 0.5, 0.5998]))


def test_truncated_normal_is_scipys() -> None:
    uniform = torch.linspace(0.0, 0.99, 50)
    ours = MaskRatio(0.4, 0.6, "truncated_normal")(uniform)
    theirs = truncnorm(a=(0.4 - 0.6) / 0.25, b=0, loc=0.6, scale=0.25).ppf(uniform.numpy())
    torch.testing.assert_close(ours.double(), torch.from_numpy(theirs), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("low", "high"), [(-0.1, 0.5), (0.6, 0.4), (0.2, 1.0)])
def test_impossible_ranges_are_refused(low: float, high: float) -> None:
    with pytest.raises(ValueError, match=f"got low={low}, high={high}"):
        MaskRatio(low, high)


def test_mask_has_the_rounded_number_of_the_lowest_scores() -> None:
    scores = torch.tensor([[0.9, 0.1, 0.5, 0.3], [0.2, 0.4, 0.6, 0.8]])
    mask = random_mask(torch.tensor([0.5, 0.3]), scores)
    assert mask.tolist() == [[False, True, False, True], [True, False, False, False]]


def test_every_patch_is_masked_equally_often() -> None:
    mask = random_mask(torch.full((20_000,), 0.5), torch.rand(20_000, 16))
    assert (mask.sum(1) == 8).all()
    assert (mask.float().mean(0) - 0.5).abs().max() < 0.02
