"""Crops lie where they should, and the resize equals torchvision's and is close to Pillow's."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from maetok.formats.crops import center_crop, random_crop
from maetok.formats.pictures import decode
from tests.support.shards import encoded


def test_center_crop_keeps_the_middle_and_the_aspect() -> None:
    image = torch.zeros(3, 20, 40, dtype=torch.uint8)
    image[:, :, 10:30] = 255
    assert center_crop(image, (20, 20)).min() == 255
    assert center_crop(image, (10, 10)).shape == (3, 10, 10)
    assert center_crop(image, (30, 20)).shape == (3, 30, 20)
    assert center_crop(image, (20, 40)).equal(image)


@pytest.mark.parametrize(("length", "first"), [(40, 10), (41, 10), (42, 11)])
def test_center_crop_begins_at_the_floor_of_half_the_rest(length: int, first: int) -> None:
    ramp = torch.arange(length, dtype=torch.uint8)
    tall, wide = ramp[None, :, None].expand(3, length, 20), ramp[None, None, :].expand(3, 20, length)
    expected = list(range(first, first + 20))
    assert center_crop(tall, (20, 20))[0, :, 0].tolist() == expected
    assert center_crop(wide, (20, 20))[0, 0, :].tolist() == expected


def test_random_crop_covers_the_wanted_share() -> None:
    ramp = torch.arange(64, dtype=torch.uint8).expand(3, 64, 64).contiguous()
    for uniform in np.random.default_rng(0).random((20, 3)):
        crop = random_crop(ramp, (32, 32), (0.8, 1.0), uniform)
        covered = (int(crop[0, 0, -1]) - int(crop[0, 0, 0])) / 63
        assert covered == pytest.approx(0.8 + 0.2 * uniform[0], abs=0.05)


def test_random_crop_reaches_every_edge() -> None:
    image = torch.arange(40, dtype=torch.uint8).expand(3, 20, 40)
    almost_one = 1 - 2**-53
    for number, (top, left) in ((0.0, (0, 0)), (almost_one, (10, 30))):
        crop = random_crop(image, (10, 10), (0.5, 0.5), (0.3, number, number))
        assert torch.equal(crop, image[:, top : top + 10, left : left + 10])


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_resize_is_antialiased_like_pillow(form: str) -> None:
    """At most 2 of 255 from Pillow's bicubic filter, on noise, which would alias most; equal to torchvision."""
    data = encoded((75, 90), form, seed=1)
    image = Image.open(io.BytesIO(data)).resize((48, 40), Image.Resampling.BICUBIC)
    decoded = decode(data)
    resized = center_crop(decoded, (40, 48))
    assert np.abs(resized.permute(1, 2, 0).numpy().astype(int) - np.asarray(image)).max() <= 2
    assert torch.equal(resized, resize(decoded, [40, 48], InterpolationMode.BICUBIC, antialias=True))
    assert torch.equal(resized, center_crop(decoded.contiguous(), (40, 48)))
    turned = decoded.transpose(1, 2).flip(2)  # as an EXIF orientation does
    assert torch.equal(center_crop(turned, (48, 40)), center_crop(turned.contiguous(), (48, 40)))
