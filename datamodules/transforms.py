"""From encoded bytes to uint8 image tensors of one size, random where asked and then by a given generator only."""

import io
import math
import warnings
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

SPLITMIX_STEP = np.uint64(0x9E3779B97F4A7C15)


class UndecodableImageError(ValueError):
    """The bytes are no image, or a damaged one."""


def decode(data: bytes) -> Tensor:
    """Encoded image -> (3, H, W) uint8, upright, usually with channels last in memory.

    EXIF orientation is applied; grey, CMYK and palette images become RGB; 16-bit values keep their high byte;
    transparent pixels are laid on white.

    Raises:
        UndecodableImageError: if this is no complete image. Damage inside the compressed pixels of a JPEG can go
            unnoticed: only the sha256 of its shard tells.
    """
    try:
        if not data.startswith(b"\xff\xd8"):
            return decode_other(data)
        with warnings.catch_warnings():
            # torchvision points to torchcodec, which would be a dependency for the same libjpeg-turbo; and torch warns
            # that the bytes must not be written to
            warnings.simplefilter("ignore")
            buffer = torch.frombuffer(data, dtype=torch.uint8)
            return decode_jpeg(buffer, mode=ImageReadMode.RGB, apply_exif_orientation=True)
    except UnidentifiedImageError as error:
        raise UndecodableImageError(f"no known image format; begins with {data[:8]!r}") from error
    except Exception as error:  # a damaged file can raise nearly anything in Pillow
        reason = str(error).splitlines()[0] if str(error) else ""
        raise UndecodableImageError(f"{type(error).__name__}: {reason}") from error


def decode_other(data: bytes) -> Tensor:
    """As :func:`decode`, for everything but JPEG."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    if image.mode in ("I", "F"):
        raise ValueError("32 bits per pixel, whose black and white nobody knows")
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip to white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def resize_to_cover(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Bicubic antialiased resize of (3, H, W) uint8, keeping its shape, to the smallest size that covers ``size``."""
    channels, height, width = image.shape
    scale = max(size[0] / height, size[1] / width)
    if scale == 1.0:
        return image
    new_size = [max(round(height * scale), size[0]), max(round(width * scale), size[1])]
    # With this stride of the batch, torch sees that channels come last and does not copy the image before it begins.
    batch = image.as_strided((1, channels, height, width), (image.numel(), *image.stride()))
    return F.interpolate(batch, new_size, mode="bicubic", antialias=True)[0]


def center_crop(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize to cover ``size``, then cut out the centre: (3, H, W) -> (3, *size) uint8."""
    image = resize_to_cover(image, size)
    top, left = (image.shape[-2] - size[0]) // 2, (image.shape[-1] - size[1]) // 2
    return image[:, top : top + size[0], left : left + size[1]]


def random_crop(image: Tensor, size: tuple[int, int], scale: tuple[float, float], uniform: Sequence[float]) -> Tensor:
    """A random window of ``size`` that covers a share of the image's short side drawn from ``scale``.

    The image is resized so that its covering size is between ``size / scale[1]`` and ``size / scale[0]``.

    Args:
        image: (3, H, W) uint8.
        size: (height, width) of the window.
        scale: lowest and highest share.
        uniform: three numbers in [0, 1) that decide share, top and left.
    """
    factor = 1.0 / (scale[0] + uniform[0] * (scale[1] - scale[0]))
    image = resize_to_cover(image, (math.ceil(size[0] * factor), math.ceil(size[1] * factor)))
    top = int(uniform[1] * (image.shape[-2] - size[0] + 1))
    left = int(uniform[2] * (image.shape[-1] - size[1] + 1))
    return image[:, top : top + size[0], left : left + size[1]]


def uniform_numbers(seed: int, epochs: np.ndarray, indices: np.ndarray, count: int) -> np.ndarray:
    """Random numbers in [0, 1) that are a function of (seed, epoch, sample) alone.

    A hash (the output function of SplitMix64, Steele, Lea and Flood 2014) gives those of a whole batch at once; to
    construct a generator per sample takes a tenth of the time that decoding does.

    Args:
        seed: any non-negative integer below 2^63.
        epochs: (B,) int64.
        indices: (B,) int64.
        count: numbers per sample.

    Returns:
        (B, count) float64.
    """
    state = np.full(len(indices), seed, dtype=np.uint64)
    for part in (epochs, indices):
        state = scrambled(state + SPLITMIX_STEP) ^ part.astype(np.uint64)
    state = scrambled(state + SPLITMIX_STEP)
    numbers = scrambled(state[:, None] + np.arange(1, count + 1, dtype=np.uint64) * SPLITMIX_STEP)
    return (numbers >> np.uint64(11)).astype(np.float64) * 2.0**-53


def scrambled(values: np.ndarray) -> np.ndarray:
    """SplitMix64's output function on uint64, which wraps around."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
