"""Every kind of image file is shown as people see it, and crops are where they should be."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from scipy.stats import kstest
from sklearn.datasets import load_sample_images
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from datamodules.transforms import UndecodableImageError, center_crop, decode, random_crop, uniform_numbers
from tests.support.shards import encoded


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.fromarray(load_sample_images().images[0]).resize((96, 64))


def saved(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def pixels(data: bytes) -> np.ndarray:
    decoded = decode(data)
    assert decoded.dtype == torch.uint8
    return decoded.permute(1, 2, 0).numpy()


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_equals_pillow(photo: Image.Image, mode: str, progressive: bool) -> None:
    data = saved(photo.convert(mode), "JPEG", quality=90, progressive=progressive)
    assert np.array_equal(pixels(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    close = np.abs(
        pixels(data).astype(int) - np.asarray(photo.convert("RGB" if mode == "CMYK" else mode).convert("RGB"))
    )
    assert close.mean() < 6  # inverted colours would differ by 90


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_applied(photo: Image.Image, form: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(photo, form, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert np.array_equal(pixels(data), np.asarray(expected))
    assert expected.size == ((96, 64) if orientation < 5 else (64, 96))


def test_sixteen_bit_grey_keeps_its_brightness() -> None:
    data = saved(Image.fromarray(np.array([[0, 32768, 65535]], dtype=np.uint16)), "PNG")
    assert pixels(data).tolist() == [[[0] * 3, [128] * 3, [255] * 3]]


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_values_of_unknown_range_are_no_image(kind: type) -> None:
    """They would become black, whatever they show."""
    with pytest.raises(UndecodableImageError, match="32 bits per pixel"):
        decode(saved(Image.fromarray(np.array([[0, 128, 255]], dtype=kind)), "TIFF"))


def test_sixteen_bit_colours_keep_their_high_byte() -> None:
    for channels, colour_type in ((3, 2), (4, 6), (2, 4)):
        values = np.array([[[65535, 32768, 256, 65535][-channels:]]], dtype=">u2")
        expected = {3: [128, 1, 255], 4: [255, 128, 1], 2: [1, 1, 1]}[channels]
        assert pixels(png_of(values, colour_type)).tolist() == [[expected]]


def png_of(values: np.ndarray, colour_type: int) -> bytes:
    """(H, W, C) as 16-bit PNG, which Pillow cannot write in colour."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def test_one_bit_palette_and_gif(photo: Image.Image) -> None:
    one_bit = saved(Image.fromarray(np.array([[0, 255]], dtype=np.uint8)).convert("1"), "PNG")
    assert pixels(one_bit).tolist() == [[[0] * 3, [255] * 3]]
    palette = photo.quantize(256)
    for form in ("PNG", "GIF"):
        assert np.array_equal(pixels(saved(palette, form)), np.asarray(palette.convert("RGB")))


def test_transparent_pixels_are_laid_on_white() -> None:
    image = Image.new("RGBA", (3, 1))
    image.putdata([(200, 0, 0, 255), (200, 0, 0, 0), (200, 0, 0, 128)])
    half = round(200 * 128 / 255 + 127)
    expected = [[200, 0, 0], [255, 255, 255], [half, 127, 127]]
    for data in (saved(image, "PNG"), saved(image, "WEBP", lossless=True, exact=True)):
        assert np.abs(pixels(data)[0].astype(int) - expected).max() <= 1
    grey = Image.new("LA", (1, 1), (10, 0))
    assert pixels(saved(grey, "PNG")).tolist() == [[[255] * 3]]
    palette = Image.new("P", (1, 1), 3)
    palette.putpalette([0, 0, 0] * 3 + [9, 9, 9])
    assert pixels(saved(palette, "PNG", transparency=3)).tolist() == [[[255] * 3]]
    assert pixels(saved(palette, "PNG")).tolist() == [[[9] * 3]]


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_damaged_images_are_recognised(photo: Image.Image, form: str) -> None:
    data = saved(photo, form)
    for broken in (data[: len(data) // 2], data[:20], data[:2], b"", b"not an image", bytes(500)):
        with pytest.raises(UndecodableImageError):
            decode(broken)


def test_center_crop_keeps_the_middle_and_the_aspect() -> None:
    image = torch.zeros(3, 20, 40, dtype=torch.uint8)
    image[:, :, 10:30] = 255
    assert center_crop(image, (20, 20)).min() == 255
    assert center_crop(image, (10, 10)).shape == (3, 10, 10)
    assert center_crop(image, (30, 20)).shape == (3, 30, 20)
    assert center_crop(image, (20, 40)).equal(image)


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


def test_uniform_numbers_depend_on_each_part_and_are_uniform() -> None:
    epochs, indices = (part.reshape(-1) for part in np.meshgrid(np.arange(20), np.arange(5000)))
    numbers = uniform_numbers(3, epochs, indices, 4)
    assert numbers.shape == (100_000, 4)
    assert len(np.unique(numbers)) == 400_000
    again = uniform_numbers(3, epochs[77:78], indices[77:78], 4)
    assert np.array_equal(again[0], numbers[77])
    assert not np.intersect1d(uniform_numbers(4, epochs, indices, 4), numbers).size
    for column in numbers.T:
        assert kstest(column, "uniform").pvalue > 1e-3
    neighbours = numbers.reshape(5000, 20, 4)
    for one, other in (
        (neighbours[1:], neighbours[:-1]),
        (neighbours[:, 1:], neighbours[:, :-1]),
        (neighbours[..., 1:], neighbours[..., :-1]),
    ):
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.01


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
