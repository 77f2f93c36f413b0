"""DiffAugment (Zhao et al. 2020): differentiable colour jitter, translation and cutout before the discriminator."""

import torch
from torch import Tensor, nn

UNIFORM_NUMBERS = 7
"""Uniform numbers per image: brightness, saturation, contrast, shift y, shift x, cutout y, cutout x."""


class DiffAugment(nn.Module):
    """Augments images as a function of uniform numbers, so that the caller controls all randomness.

    Args:
        color: shift brightness by up to 0.5, scale saturation by 0 to 2 and contrast by 0.5 to 1.5.
        translation: largest shift as a share of the side; pixels from outside are 0 (grey). 0 turns it off.
        cutout: side of a square set to 0 as a share of the image's side; 0 turns it off.
    """

    def __init__(self, color: bool = True, translation: float = 0.125, cutout: float = 0.2) -> None:
        super().__init__()
        self.color, self.translation, self.cutout = color, translation, cutout

    def forward(self, images: Tensor, uniform: Tensor) -> Tensor:
        """Augment each image by its own numbers.

        Args:
            images: (B, 3, H, W) in [-1, 1].
            uniform: (B, 7) in [0, 1).

        Returns:
            (B, 3, H, W); values may leave [-1, 1].
        """
        brightness, saturation, contrast = uniform[:, :3].to(images.dtype).T[..., None, None, None]
        if self.color:
            images = images + (brightness - 0.5)
            grey = images.mean(1, keepdim=True)
            images = (images - grey) * (saturation * 2) + grey
            mean = images.mean((1, 2, 3), keepdim=True)
            images = (images - mean) * (contrast + 0.5) + mean
        if self.translation:
            images = translate(images, uniform[:, 3:5], self.translation)
        if self.cutout:
            images = images * cutout_mask(images, uniform[:, 5:7], self.cutout)
        return images


def translate(images: Tensor, uniform: Tensor, share: float) -> Tensor:
    """Shift each image by whole pixels, up to ``share`` of its side each way; uniform is (B, 2): y, x."""
    batch, _, height, width = images.shape
    limit_y, limit_x = round(height * share), round(width * share)
    shift_y, shift_x = (uniform[:, :1] * (2 * limit_y + 1)).long(), (uniform[:, 1:] * (2 * limit_x + 1)).long()
    rows = torch.arange(height, device=images.device)[None, :] - shift_y + limit_y  # shifted by -limit ... limit
    columns = torch.arange(width, device=images.device)[None, :] - shift_x + limit_x
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    rows, columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
    samples = torch.arange(batch, device=images.device)[:, None, None]
    moved = images.permute(0, 2, 3, 1)[samples, rows[:, :, None], columns[:, None, :]]
    return moved.permute(0, 3, 1, 2) * inside[:, None]


def cutout_mask(images: Tensor, uniform: Tensor, share: float) -> Tensor:
    """Return (B, 1, H, W) ones with a square of zeros: ``share`` of the side, centred anywhere; uniform is (B, 2)."""
    height, width = images.shape[-2:]
    centre_y, centre_x = uniform[:, :1] * height, uniform[:, 1:] * width
    rows = (torch.arange(height, device=images.device) + 0.5 - centre_y).abs() < share * height / 2
    columns = (torch.arange(width, device=images.device) + 0.5 - centre_x).abs() < share * width / 2
    return (~(rows[:, :, None] & columns[:, None, :])).to(images.dtype)[:, None]
