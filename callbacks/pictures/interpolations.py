"""Images decoded between the latents of validation images."""

from dataclasses import asdict
from typing import Any

import torch
from jsonargparse.typing import PositiveInt
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from callbacks.latents import gather
from callbacks.pictures.drawing import picture_grid, show_picture
from callbacks.schedule import current_step, is_last_validation
from maetok.analysis.interpolation import interpolated, midpoint_errors


class Interpolations(Callback):
    """Draws and measures what lies between latents, in the last validation and in ``validate`` and ``test``.

    A row of the picture shows image A, images decoded at even steps between the latents of A and B, and image B. The
    loggers show the picture, and ``pictures/interpolations_step=S.png`` holds it. The callback logs the errors of the
    midpoints of all pairs as ``validation/interpolation_cycle_error``, ``validation/interpolation_cycle_error_of_ends``
    and ``validation/interpolation_pixel_change`` (:class:`maetok.analysis.interpolation.MidpointErrors`). The images of
    a pair lie half of the measured images apart; pairs are the same on any number of processes. The datamodule must
    have images and ``evaluation_dataloader(split, max_samples)``.

    Args:
        pairs: number of pairs of images to measure.
        rows: number of pairs to draw.
        steps: number of images to draw between A and B.
        side: side of one picture in pixels.
    """

    def __init__(
        self, pairs: PositiveInt = 32, rows: PositiveInt = 8, steps: PositiveInt = 5, side: PositiveInt = 64
    ) -> None:
        self.pairs, self.rows, self.steps, self.side = pairs, rows, steps, side

    @torch.no_grad()
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Gather images on all processes; encode, decode, draw and measure on the first; log on all."""
        if trainer.sanity_checking or not is_last_validation(trainer):
            return
        found, _ = gather(trainer, pl_module, "validation", 2 * self.pairs, lambda images: [images])
        numbers: dict[str, float] = {}
        if trainer.is_global_zero:
            pairs = len(found) // 2
            first, second = (
                torch.from_numpy(found[start : start + pairs]).to(pl_module.device) for start in (0, pairs)
            )
            self.draw(trainer, pl_module, first[: self.rows], second[: self.rows])
            latents = pl_module.encode(first), pl_module.encode(second)
            errors = midpoint_errors(pl_module.encode, pl_module.decode, *latents)
            numbers = asdict(errors)
        for name, value in trainer.strategy.broadcast(numbers).items():
            pl_module.log(f"validation/interpolation_{name}", value, rank_zero_only=True)

    on_test_epoch_end = on_validation_epoch_end

    def draw(self, trainer: Trainer, pl_module: Any, first: Tensor, second: Tensor) -> None:
        """Draw a row for each pair of images (P, 3, H, W)."""
        between = interpolated(pl_module.encode(first), pl_module.encode(second), self.steps)
        decoded = pl_module.decode(between.flatten(0, 1)).unflatten(0, between.shape[:2])
        columns = {f"{number + 1}/{self.steps + 1}": decoded[:, number] for number in range(self.steps)}
        grid = picture_grid({"A": first, **columns, "B": second}, self.side)
        step = current_step(trainer, pl_module)
        show_picture(trainer, "image A | between their latents | image B", grid, step, "interpolations_")
