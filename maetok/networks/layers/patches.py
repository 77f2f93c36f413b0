"""Grids of square patches for image sizes, and images from patches."""

from torch import Tensor


def as_pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """Return (height, width) for one side length or a pair."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def patch_grid(size: int | tuple[int, int], patch_size: int) -> tuple[int, int]:
    """Return (rows, columns) of the patches of an image of ``size``.

    Raises:
        ValueError: if a side is not divisible by the patch size.
    """
    height, width = as_pair(size)
    if height % patch_size or width % patch_size or not height or not width:
        raise ValueError(f"image size {height}x{width} is not divisible by patch_size={patch_size}")
    return height // patch_size, width // patch_size


def grid_of(images: Tensor, patch_size: int) -> tuple[int, int]:
    """Return (rows, columns) of the patches of images (..., H, W); see :func:`patch_grid`."""
    return patch_grid((images.shape[-2], images.shape[-1]), patch_size)


def unpatchify(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """Join patches (B, N, p * p * 3), in raster order with values (row, column, channel), to images (B, 3, H, W)."""
    patch_size = round((patches.shape[-1] / 3) ** 0.5)
    values = patches.unflatten(1, grid).unflatten(-1, (patch_size, patch_size, 3))
    return values.permute(0, 5, 1, 3, 2, 4).reshape(patches.shape[0], 3, grid[0] * patch_size, grid[1] * patch_size)
