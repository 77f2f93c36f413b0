"""Pictures and statistics of the latents of validation images."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jsonargparse.typing import PositiveInt
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from callbacks.latents import gather
from callbacks.pictures.drawing import show_picture, tensorboard_writers
from callbacks.schedule import current_step, is_last_validation
from maetok.analysis.latent_summary import LatentSummary
from maetok.analysis.plane import draw_classes, principal_components, tsne
from maetok.analysis.subsets import class_balanced
from maetok.metrics import to_unit_range


class LatentPictures(Callback):
    """Draws latents by class and writes their statistics, in the last validation and in ``validate`` and ``test``.

    The loggers show the picture, and ``pictures/latents_step=S.png`` holds it. ``analysis/latent_statistics.json`` has
    the statistics of all samples. Only TensorBoard also gets the statistics, as scalars and as histograms over the
    channels, and the latents with class and image in its embedding projector. Picture and projector show the first
    50 principal components of the first classes, with the same number of samples of each class where there are enough.
    The datamodule must have images and ``evaluation_dataloader(split, max_samples)``.

    Args:
        max_samples: largest number of validation samples; they are spread evenly over the split.
        classes: largest number of classes to show.
        per_class: largest number of samples of each class to show.
        side: side of an image in the projector, in pixels.
    """

    def __init__(
        self,
        max_samples: PositiveInt = 10_000,
        classes: PositiveInt = 10,
        per_class: PositiveInt = 100,
        side: PositiveInt = 32,
    ) -> None:
        self.max_samples, self.classes, self.per_class, self.side = max_samples, classes, per_class, side

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Gather on all processes, draw and write on the first."""
        if trainer.sanity_checking or not is_last_validation(trainer):
            return

        def measure(images: Tensor) -> list[Tensor]:
            small = F.interpolate(images, size=(self.side, self.side), mode="area")
            return [pl_module.encode(images).float(), (to_unit_range(small) * 255).round().byte()]

        latents, images, labels = gather(trainer, pl_module, "validation", self.max_samples, measure)
        if not trainer.is_global_zero:
            return
        shown = np.flatnonzero(np.isin(labels, np.unique(labels)[: self.classes]))
        shown = shown[class_balanced(labels[shown], self.per_class)]
        components, labels = principal_components(latents[shown]), labels[shown]
        panels = {"principal components": components[:, :2], "t-SNE": tsne(components)}
        picture = torch.from_numpy(draw_classes(panels, labels)).permute(2, 0, 1).float() / 255
        statistics = LatentSummary.of(latents)
        folder, step = Path(trainer.default_root_dir), current_step(trainer, pl_module)
        write_statistics(statistics, step, folder / "analysis" / "latent_statistics.json")
        show_picture(trainer, "latents: " + " | ".join(panels), picture, step, "latents_")
        sprites = torch.from_numpy(images[shown]).float() / 255
        for writer in tensorboard_writers(trainer):
            writer.add_embedding(components, [str(label) for label in labels], sprites, step, "latents")
            log_statistics(writer, statistics, step)

    on_test_epoch_end = on_validation_epoch_end


def write_statistics(statistics: LatentSummary, step: int, path: Path) -> None:
    """Write the statistics and the step of the weights as JSON, making the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"step": step, **asdict(statistics)}, indent=1))


def log_statistics(writer: Any, statistics: LatentSummary, step: int) -> None:
    """Write numbers as scalars and lists over channels as histograms to a TensorBoard writer."""
    for name, value in asdict(statistics).items():
        if isinstance(value, list):
            writer.add_histogram(f"latents/{name}", np.array(value), step)
        else:
            writer.add_scalar(f"latents/{name}", value, step)
