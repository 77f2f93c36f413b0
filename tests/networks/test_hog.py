"""HOG agrees with reference numbers and with its symmetries."""

import pytest
import torch
from safetensors.torch import load_file

from maetok.networks.targets.hog import HOGTarget, hog_cells
from tests.conftest import DATA

GOLDEN = load_file(DATA / "hog" / "io.safetensors")
LEVELS = GOLDEN["image_u8"].float()


@pytest.mark.parametrize(("window", "key"), [(16, "hog_cells"), (0, "hog_cells_nowindow")])
def test_cells(window: int, key: str) -> None:
    torch.testing.assert_close(hog_cells(LEVELS, window_size=window), GOLDEN[key], atol=1e-6, rtol=0)


@pytest.mark.parametrize("autocast", [False, True])
def test_patches_from_normalised_images(autocast: bool) -> None:
    target = HOGTarget(patch_size=16)
    assert target.dim == 108
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        patches = target(LEVELS / 127.5 - 1)
    torch.testing.assert_close(patches, GOLDEN["hog_patches"], atol=1e-6, rtol=0)


def test_cells_have_unit_length_or_are_empty() -> None:
    lengths = hog_cells(LEVELS).norm(dim=2)
    filled = lengths > 0.5
    torch.testing.assert_close(lengths, filled.float())
    assert filled.float().mean() > 0.9
    assert hog_cells(torch.full((1, 3, 16, 16), 9.0)).abs().max() == 0


def test_rectangular_images_and_small_cells() -> None:
    target = HOGTarget(patch_size=8, cell_size=4)
    assert target.dim == 3 * 9 * 4
    assert target(torch.rand(2, 3, 16, 40) * 2 - 1).shape == (2, 2 * 5, 108)


def test_edges_are_drawn_along_themselves() -> None:
    """A vertical edge gives bright vertical strokes."""
    image = torch.full((1, 3, 16, 16), -1.0)
    image[..., 8:] = 1.0
    target = HOGTarget(patch_size=16)
    features = target(image)
    picture = target.picture(features, (1, 1), features)[0, 0]
    cell = picture[:8, :8] + 1
    assert cell.sum(0).max() > 3 * cell.sum(1).max()  # one column collects the stroke, no row does


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="cell_size=8 does not divide patch_size=12"):
        HOGTarget(patch_size=12)
    with pytest.raises(ValueError, match="image size 12x16 is not divisible"):
        hog_cells(torch.zeros(1, 3, 12, 16))
