"""HOG targets in the form of MaskFeat: histograms of oriented gradients per colour channel and cell."""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from maetok.networks.targets.targets import FeatureTarget


@lru_cache(maxsize=8)
def gaussian_window(size: int, device: torch.device) -> Tensor:
    """Return a (size, size) Gaussian with standard deviation size / 2, summing to one."""
    offsets = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    profile = torch.exp(-0.5 * (offsets / (size / 2)) ** 2)
    window = profile[:, None] * profile[None, :]
    return (window / window.sum()).float().to(device)


@lru_cache(maxsize=8)
def sobel_kernels(device: torch.device) -> Tensor:
    """Return kernels (2, 1, 3, 3): left minus right, and above minus below."""
    kernel = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
    return torch.stack((kernel, kernel.T))[:, None].to(device)


def hog_cells(levels: Tensor, bins: int = 9, cell_size: int = 8, window_size: int = 16) -> Tensor:
    """Return histograms of gradient orientations, each of unit length.

    Sobel gradients (reflected border, left minus right and above minus below) vote with their magnitude, weighted by a
    Gaussian window tiled over the image, for ``floor(atan2(gx, gy) / pi * bins) mod bins``.

    Args:
        levels: (B, 3, H, W) grey levels 0..255 as float.
        bins: orientation bins over 180 degrees.
        cell_size: side of a cell in pixels; must divide H and W.
        window_size: side of the Gaussian window in pixels; 0 for none.

    Returns:
        (B, 3, bins, H / cell_size, W / cell_size) float32.

    Raises:
        ValueError: if the image is not divisible into cells.
    """
    batch, channels, height, width = levels.shape
    if height % cell_size or width % cell_size:
        raise ValueError(f"image size {height}x{width} is not divisible by the HOG cell size {cell_size}")
    padded = F.pad(levels.float(), (1, 1, 1, 1), mode="reflect").flatten(0, 1)[:, None]
    with torch.autocast(levels.device.type, enabled=False):
        gradient_x, gradient_y = F.conv2d(padded, sobel_kernels(levels.device)).unbind(1)
    magnitude = torch.hypot(gradient_x, gradient_y)
    if window_size:
        repeats = (math.ceil(height / window_size), math.ceil(width / window_size))
        magnitude = magnitude * gaussian_window(window_size, levels.device).repeat(repeats)[:height, :width]
    bin_index = torch.floor(torch.atan2(gradient_x, gradient_y) / math.pi * bins).long() % bins
    votes = torch.zeros(batch * channels, bins, height, width, device=levels.device)
    votes.scatter_(1, bin_index[:, None], magnitude[:, None])
    histograms = F.avg_pool2d(votes, cell_size) * cell_size**2
    return F.normalize(histograms, dim=1, eps=1e-12).unflatten(0, (batch, channels))


class HOGTarget(FeatureTarget):
    """HOG of each patch: (colour, bin, cell row, cell column), 108 values for 16-pixel patches (paper section 3.2).

    Args:
        patch_size: side of a patch in pixels.
        cell_size: side of a cell in pixels; must divide the patch size.
        bins: orientation bins.
        window_size: side of the Gaussian window in pixels.

    Raises:
        ValueError: if ``cell_size`` does not divide ``patch_size``.
    """

    loss = "mse"

    def __init__(self, patch_size: int, cell_size: int = 8, bins: int = 9, window_size: int = 16) -> None:
        super().__init__()
        if patch_size % cell_size:
            raise ValueError(f"HOG cell_size={cell_size} does not divide patch_size={patch_size}")
        self.patch_size, self.cell_size, self.bins, self.window_size = patch_size, cell_size, bins, window_size
        self.cells_per_side = patch_size // cell_size
        self.dim = 3 * bins * self.cells_per_side**2

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, 3, H, W) in [-1, 1] -> (B, N, dim), after rounding them to their 256 levels."""
        levels = ((images.float() + 1.0) * 127.5).round()
        cells = hog_cells(levels, self.bins, self.cell_size, self.window_size)
        side = self.cells_per_side
        rows, columns = cells.shape[-2] // side, cells.shape[-1] // side
        per_patch = cells.unflatten(-1, (columns, side)).unflatten(-3, (rows, side))
        return per_patch.permute(0, 3, 5, 1, 2, 4, 6).flatten(3).flatten(1, 2)

    def picture(self, features: Tensor, grid: tuple[int, int], reference: Tensor) -> Tensor:
        """Draw each cell as a star of edge directions: (B, N, dim) -> (B, 3, rows * s, columns * s) in [-1, 1]."""
        side, glyph = self.cells_per_side, max(self.cell_size, 8)
        cells = features.float().unflatten(1, grid).unflatten(-1, (3, self.bins, side, side)).mean(3)
        cells = cells.permute(0, 3, 1, 4, 2, 5).flatten(2, 3).flatten(3)  # (B, bins, rows, columns) of cells
        brightness = torch.einsum("bnrc,nyx->brycx", cells.clamp_min(0), edge_glyphs(self.bins, glyph).to(cells.device))
        canvas = brightness.flatten(1, 2).flatten(2).clamp(0, 1)[:, None]
        return (canvas * 2 - 1).expand(-1, 3, -1, -1)


def edge_glyphs(bins: int, side: int) -> Tensor:
    """Return (bins, side, side) soft line segments along the edge direction of each orientation bin."""
    offsets = torch.arange(side).float() - (side - 1) / 2
    # bin k is centred at angle (k + 1/2) pi / bins of atan2(gx, gy): the gradient points along (sin, cos)
    angle = (torch.arange(bins).float() + 0.5)[:, None, None] * math.pi / bins
    distance_to_line = offsets[None, None, :] * torch.sin(angle) + offsets[None, :, None] * torch.cos(angle)
    return torch.exp(-0.5 * (distance_to_line / 0.7) ** 2)
