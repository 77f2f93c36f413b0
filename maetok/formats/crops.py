"""Crops of uint8 images: the centre crop of evaluation and of the metric protocols, and the random crop of training."""

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

CENTER_CROP = {"resize": "bicubic, antialiased, to cover", "crop": "center"}
"""Description of :func:`center_crop`, for protocols and manifests."""


def resize_to_cover(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize (3, H, W) uint8, bicubic and antialiased, to the smallest size that covers ``size``."""
    channels, height, width = image.shape
    scale = max(size[0] / height, size[1] / width)
    if scale == 1.0:
        return image
    new_size = [max(round(height * scale), size[0]), max(round(width * scale), size[1])]
    # With this batch stride torch recognises channels-last memory and does not copy the image first.
    batch = image.as_strided((1, channels, height, width), (image.numel(), *image.stride()))
    return F.interpolate(batch, new_size, mode="bicubic", antialias=True)[0]


def center_crop(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize to cover ``size``, then cut out the centre: (3, H, W) -> (3, *size) uint8.

    Validation, latent encoding and both metric protocols (``rfid-val``, ``gfid-adm``) use this crop. The reference
    file of ``gfid-adm`` holds images that ADM's own script cropped; they are never cropped here.
    """
    image = resize_to_cover(image, size)
    top, left = (image.shape[-2] - size[0]) // 2, (image.shape[-1] - size[1]) // 2
    return image[:, top : top + size[0], left : left + size[1]]


def random_crop(image: Tensor, size: tuple[int, int], scale: tuple[float, float], uniform: Sequence[float]) -> Tensor:
    """Cut out a random window that covers a random share of the image's short side, as ADM does in training.

    The image is resized first, so that its covering size lies between ``size / scale[1]`` and ``size / scale[0]``
    (Dhariwal and Nichol 2021, guided-diffusion, ``random_crop_arr``). No metric protocol uses this crop.

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
