"""From encoded bytes to uint8 image tensors of one size, random where asked and then by a given generator only."""

import math
import warnings

import numpy as np
import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F


def decode(data: bytes) -> Tensor:
    """Encoded image -> (3, H, W) uint8; raises RuntimeError for data that is no image."""
    with warnings.catch_warnings():
        # torchvision points to torchcodec, which would be a dependency for the same libjpeg-turbo
        warnings.simplefilter("ignore", DeprecationWarning)
        image = decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
    # a 16-bit PNG comes as uint16
    return image if image.dtype == torch.uint8 else (image.to(torch.int32) >> 8).to(torch.uint8)


def resize_to_cover(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Bicubic antialiased resize of (3, H, W) uint8, keeping its shape, to the smallest size that covers ``size``."""
    scale = max(size[0] / image.shape[-2], size[1] / image.shape[-1])
    if scale == 1.0:
        return image
    new_size = [max(round(side * scale), wanted) for side, wanted in zip(image.shape[-2:], size, strict=True)]
    return F.resize(image, new_size, interpolation=InterpolationMode.BICUBIC, antialias=True)


def center_crop(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize to cover ``size``, then cut out the centre: (3, H, W) -> (3, *size) uint8."""
    image = resize_to_cover(image, size)
    top, left = (image.shape[-2] - size[0]) // 2, (image.shape[-1] - size[1]) // 2
    return image[:, top : top + size[0], left : left + size[1]]


def random_crop(
    image: Tensor, size: tuple[int, int], scale: tuple[float, float], generator: np.random.Generator
) -> Tensor:
    """A random window of ``size`` that covers a share of the image's short side drawn from ``scale``.

    The image is resized so that its covering size is between ``size / scale[1]`` and ``size / scale[0]``.
    """
    factor = 1.0 / generator.uniform(*scale)
    image = resize_to_cover(image, (math.ceil(size[0] * factor), math.ceil(size[1] * factor)))
    top = int(generator.integers(image.shape[-2] - size[0] + 1))
    left = int(generator.integers(image.shape[-1] - size[1] + 1))
    return image[:, top : top + size[0], left : left + size[1]]
