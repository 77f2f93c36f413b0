"""Pictures of what a task does with a few fixed validation images."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from callbacks.pictures.drawing import picture_grid, save_png
from callbacks.schedule import training_step


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
        step = training_step(trainer, pl_module)
        grid = picture_grid(columns, self.side)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image(" | ".join(columns), grid, step)
        save_png(grid, Path(trainer.default_root_dir) / "pictures" / f"step={step:09d}.png")

    on_test_batch_end = on_validation_batch_end
