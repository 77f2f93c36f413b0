"""Every kind of image file decodes to what people see."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_images

from maetok.formats.pictures import UndecodableImageError, decode


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
