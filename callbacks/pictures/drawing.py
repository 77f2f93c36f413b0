"""Grids of pictures, and PNG files of them."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor


def picture_grid(columns: dict[str, Tensor], side: int, gap: int = 2) -> Tensor:
    """Draw one row per image and one column per view, resized to ``side`` pixels: (3, H, W) float in [0, 1].

    Args:
        columns: views (B, 3, h, w) in [-1, 1] by name, in order.
        side: side of a cell in pixels.
        gap: white pixels between cells.
    """
    cells = [F.interpolate(view.detach().float().cpu(), size=(side, side), mode="nearest") for view in columns.values()]
    grid = torch.stack(cells, dim=1).clamp(-1, 1).add(1).div(2)  # (B, V, 3, side, side)
    grid = F.pad(grid, (gap, gap, gap, gap), value=1.0)
    return grid.permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)


def save_png(image: Tensor, path: Path) -> None:
    """Write (3, H, W) float in [0, 1] as PNG, making the folder."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy()).save(path)
