"""Metrics of samples under the protocol ``gfid-adm``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from lightning.pytorch import Trainer
from torch import nn

from callbacks.measures.protocol import ProtocolCallback
from maetok.metrics import Metric, to_uint8
from maetok.metrics.evaluator import ImageEvaluator
from maetok.metrics.image_files import open_images, reference_gaussians
from maetok.metrics.protocols import GFID_ADM


class SampleMetrics(ProtocolCallback):
    """Draws samples and measures them in the validation of the last step, in ``validate`` and in ``test``.

    Logs the distance as ``validation/gfid`` with Inception and as ``validation/sample_fd`` with any other network.
    Prints all results with the name and the hash of the protocol, and appends them to ``metrics.json`` in the run
    directory; ``python -m maetok.metrics --protocol gfid-adm`` measures the same on files. Sample i has class
    i mod ``num_classes`` and depends only on class, index and sampling seed, on any number of processes.

    Args:
        features: Inception, or any network that maps images in [0, 1] to one vector each.
        reference: reference file of the ADM evaluation suite, or npz file or folder of images.
        num_classes: number of classes, of which equally many samples are drawn.
        samples: number of samples; the protocol says 50,000.
        guidance_scale: overrides the scale of the task's ``sampling``; 1 disables guidance.
        batch_size: samples and reference images per process at a time.
        every_n_steps: measure also in the first validation at or after each multiple of this step; 0 for the last
            step only.
        metrics: metrics to measure besides the protocol's, each a :class:`maetok.metrics.Metric`.
    """

    measured = "sample"

    def __init__(
        self,
        features: nn.Module,
        reference: str,
        num_classes: PositiveInt,
        samples: PositiveInt = 50_000,
        guidance_scale: float | None = None,
        batch_size: PositiveInt = 250,
        every_n_steps: NonNegativeInt = 0,
        metrics: Sequence[Metric] = (),
    ) -> None:
        super().__init__(features, metrics, every_n_steps)
        self.reference, self.num_classes = Path(reference), num_classes
        self.samples, self.guidance_scale, self.batch_size = samples, guidance_scale, batch_size

    @torch.no_grad()
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Sample and read on all processes, measure and report."""
        if not self.measures(trainer):
            return self.forget(trainer)
        references = open_images(self.reference)
        moments = reference_gaussians(references, self.features.is_inception)
        evaluator = ImageEvaluator(
            GFID_ADM, self.features, reference_moments=moments, device=pl_module.device, metrics=self.metrics
        )
        rank, world_size = trainer.global_rank, trainer.world_size
        for indices in torch.arange(rank, self.samples, world_size, device=pl_module.device).split(self.batch_size):
            images = pl_module.sample(indices % self.num_classes, indices, guidance_scale=self.guidance_scale)
            evaluator.update(to_uint8(images), indices)
        starts = np.arange(0, len(references), self.batch_size)
        for number, (start, images) in enumerate(zip(starts, references.batches(self.batch_size), strict=True)):
            if number % world_size == rank:
                evaluator.update(images, start + torch.arange(len(images)), is_reference=True)
        measurement = evaluator.compute(self.samples, len(references))
        where = {"reference_path": str(self.reference), "guidance_scale": self.guidance_scale}
        return self.report(trainer, pl_module, measurement, where)

    on_test_epoch_end = on_validation_epoch_end
