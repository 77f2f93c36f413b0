"""Decode encoded images of any common format into uint8 tensors."""

import io
import warnings

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg


class UndecodableImageError(ValueError):
    """The bytes are not an image, or the image is damaged."""


def decode(data: bytes) -> Tensor:
    """Decode an image into (3, H, W) uint8, upright, usually with channels last in memory.

    The EXIF orientation is applied. Grey, CMYK and palette images become RGB. 16-bit values keep their high byte.
    Transparent pixels are blended with white.

    Raises:
        UndecodableImageError: if the bytes are not a complete image, or have 32 bits per channel. A JPEG whose
            compressed pixels are damaged may still decode; only the sha256 of its shard reveals that.
    """
    try:
        if not data.startswith(b"\xff\xd8"):
            return decode_with_pillow(data)
        with warnings.catch_warnings():
            # torchvision recommends torchcodec, a further dependency on the same libjpeg-turbo. torch warns that the
            # bytes are read-only; nothing writes to them.
            warnings.simplefilter("ignore")
            buffer = torch.frombuffer(data, dtype=torch.uint8)
            return decode_jpeg(buffer, mode=ImageReadMode.RGB, apply_exif_orientation=True)
    except UnidentifiedImageError as error:
        raise UndecodableImageError(f"no known image format; begins with {data[:8]!r}") from error
    except Exception as error:  # Pillow raises many kinds of exceptions for damaged files
        reason = str(error).splitlines()[0] if str(error) else ""
        raise UndecodableImageError(f"{type(error).__name__}: {reason}") from error


def decode_with_pillow(data: bytes) -> Tensor:
    """Decode any format but JPEG; see :func:`decode`."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    if image.mode in ("I", "F"):
        raise ValueError("32 bits per pixel: the values of black and white are unknown")
    if image.mode.startswith("I"):  # 16-bit grey: Pillow would clip it to white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
