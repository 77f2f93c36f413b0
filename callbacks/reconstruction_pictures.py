"""Pictures of what a task does with a few fixed validation images."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from callbacks.base import generator_step


def picture_grid(columns: dict[str, Tensor], side: int, gap: int = 2) -> Tensor:
    """One row per image, one column per view, all resized to ``side`` pixels: (3, H, W) float in [0, 1].

    Args:
        columns: views (B, 3, h, w) in [-1, 1] by name, in order.
        side: side of a cell in pixels.
        gap: white pixels between cells.
    """
    cells = [F.interpolate(view.detach().float().cpu(), size=(side, side), mode="nearest") for view in columns.values()]
    grid = torch.stack(cells, dim=1).clamp(-1, 1).add(1).div(2)  # (B, V, 3, side, side)
    grid = F.pad(grid, (gap, gap, gap, gap), value=1.0)
    return grid.permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)


class ReconstructionPictures(Callback):
    """Draws the task's views of the first validation images, to TensorBoard and as PNG files in the run directory.

    Args:
        images: how many images to draw.
        side: side of one picture in pixels; images at least this large are drawn at this size.
    """

    def __init__(self, images: int = 8, side: int = 96) -> None:
        self.images, self.side = images, side

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Draw from the first batch of the first process."""
        if batch_idx or not trainer.is_global_zero or trainer.sanity_checking:
            return
        columns = pl_module.views(batch["images"][: self.images])
        step = generator_step(trainer, pl_module)
        grid = picture_grid(columns, self.side)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image(" | ".join(columns), grid, step)
        save_png(grid, Path(trainer.default_root_dir) / "pictures" / f"step={step:09d}.png")

    on_test_batch_end = on_validation_batch_end


def save_png(image: Tensor, path: Path) -> None:
    """Write (3, H, W) float in [0, 1] as PNG, making the folder."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy()).save(path)
