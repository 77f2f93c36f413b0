"""Pictures of what a task does with a few fixed validation images."""

from typing import Any

from jsonargparse.typing import PositiveInt
from lightning.pytorch import Callback, Trainer

from callbacks.pictures.drawing import picture_grid, show_picture
from callbacks.schedule import current_step


class ReconstructionPictures(Callback):
    """Draws the task's views of the first validation images, a row for each image, in each validation and test.

    Args:
        images: how many images to draw.
        side: side of one picture in pixels; images at least this large are drawn at this size.
    """

    def __init__(self, images: PositiveInt = 8, side: PositiveInt = 96) -> None:
        self.images, self.side = images, side

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Draw from the first batch of the first process."""
        if batch_idx or not trainer.is_global_zero or trainer.sanity_checking:
            return
        columns = pl_module.views(batch["images"][: self.images])
        step = current_step(trainer, pl_module)
        grid = picture_grid(columns, self.side)
        show_picture(trainer, " | ".join(columns), grid, step)

    on_test_batch_end = on_validation_batch_end
