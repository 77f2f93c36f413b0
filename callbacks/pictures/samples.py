"""Pictures of samples, class by class, with and without guidance; the noise of each place is always the same."""

from typing import Any

import torch
from jsonargparse.typing import PositiveInt
from lightning.pytorch import Callback, Trainer

from callbacks.pictures.drawing import picture_grid, show_picture
from callbacks.schedule import current_step


class SamplePictures(Callback):
    """Draws a grid in each validation: one row per class, the left half without guidance, the right half with it.

    Pictures depend on class and place only, so they can be compared between steps, runs and numbers of processes.

    Args:
        classes: labels to draw, one row each.
        per_class: pictures of each class, without and with guidance each.
        side: side of a picture in pixels.
        guidance_scale: scale of the right half; by default the task's ``sampling.guidance_scale``.
    """

    def __init__(
        self,
        classes: tuple[int, ...] = (207, 360, 387, 974, 88, 979, 417, 279),
        per_class: PositiveInt = 4,
        side: PositiveInt = 96,
        guidance_scale: float | None = None,
    ) -> None:
        self.classes, self.per_class, self.side, self.guidance_scale = classes, per_class, side, guidance_scale

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Sample on the first process, and save."""
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        labels = torch.tensor(self.classes, device=pl_module.device).repeat_interleave(self.per_class)
        indices = torch.arange(len(labels), device=pl_module.device)
        halves = {
            "without guidance": pl_module.sample(labels, indices, guidance_scale=1.0),
            "with guidance": pl_module.sample(labels, indices, guidance_scale=self.guidance_scale),
        }
        columns = {
            f"{name} {place}": images.unflatten(0, (len(self.classes), self.per_class))[:, place]
            for name, images in halves.items()
            for place in range(self.per_class)
        }
        grid = picture_grid(columns, self.side)
        step = current_step(trainer, pl_module)
        show_picture(trainer, "samples: without | with guidance", grid, step)
