"""Draw grids of pictures, and show a picture in every logger and in the run directory."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger
from torch import Tensor


def picture_grid(columns: dict[str, Tensor], side: int, gap: int = 2) -> Tensor:
    """Return a grid (3, H, W) float in [0, 1]: one row per image, one column per view.

    Args:
        columns: views (B, 3, h, w) in [-1, 1] by name, in order; each is resized to ``side``.
        side: side of a cell in pixels.
        gap: white pixels between cells.
    """
    cells = [F.interpolate(view.detach().float().cpu(), size=(side, side), mode="nearest") for view in columns.values()]
    grid = torch.stack(cells, dim=1).clamp(-1, 1).add(1).div(2)  # (B, V, 3, side, side)
    grid = F.pad(grid, (gap, gap, gap, gap), value=1.0)
    return grid.permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)


def show_picture(trainer: Trainer, name: str, picture: Tensor, step: int, file_prefix: str = "") -> None:
    """Log a picture to TensorBoard, Weights & Biases and MLflow, and write ``pictures/<prefix>step=N.png``.

    Call it on the first process. Other loggers show no pictures.

    Args:
        trainer: its loggers and its run directory are used.
        name: name of the picture in the loggers. MLflow allows no ``|`` and no ``:``, so they become dashes there.
        picture: (3, H, W) float in [0, 1].
        step: optimizer step that the picture shows.
        file_prefix: first part of the file name.
    """
    from PIL import Image

    image = Image.fromarray((picture.permute(1, 2, 0) * 255).round().byte().cpu().numpy())
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(name, np.asarray(image), step, dataformats="HWC")
        elif isinstance(logger, WandbLogger):
            logger.log_image(name, [image], step=step)
        elif isinstance(logger, MLFlowLogger):
            key = name.replace("|", "-").replace(":", " -")
            logger.experiment.log_image(logger.run_id, image, key=key, step=step)
    path = Path(trainer.default_root_dir) / "pictures" / f"{file_prefix}step={step:09d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def tensorboard_writers(trainer: Trainer) -> Iterator[Any]:
    """Yield the summary writers, for what only TensorBoard shows."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            yield logger.experiment
