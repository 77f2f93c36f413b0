"""Metrics of samples under the protocol ``gfid-adm``."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from callbacks.measures.records import write_measurement
from callbacks.schedule import forget_metrics, is_due
from maetok.metrics import to_uint8
from maetok.metrics.evaluator import ImageEvaluator
from maetok.metrics.features import feature_network
from maetok.metrics.image_files import open_images, reference_gaussians
from maetok.metrics.protocols import GFID_ADM

LOGGED = {
    "fid": "validation/gfid",
    "sfid": "validation/gsfid",
    "fd": "validation/sample_fd",
    "sfd": "validation/sample_sfd",
    "inception_score": "validation/inception_score",
    "precision": "validation/precision",
    "recall": "validation/recall",
}


class SampleMetrics(Callback):
    """Samples and measures in the validation of the last step, in ``validate`` and in ``test``.

    The distance is logged as ``validation/gfid`` with Inception and as ``validation/sample_fd`` with any other network.
    Everything, with the name and the hash of the protocol, is printed and appended to ``metrics.json`` in the run
    directory; ``python -m maetok.metrics --protocol gfid-adm`` measures the same on files. Sample i is of class
    i mod ``num_classes`` and depends on class, index and sampling seed alone, whatever the number of processes.

    Args:
        features: Inception, or any network from images in [0, 1] to one vector each.
        reference: reference file of the ADM evaluation suite, or npz file or folder of images.
        num_classes: number of classes, of which equally many samples are drawn.
        samples: how many; the protocol says 50,000.
        guidance_scale: that of the task's ``sampling`` if not given; 1 for no guidance.
        batch_size: samples and reference images per process at a time.
        every_n_steps: measure as well in the first validation at or after each multiple of this step; 0 for the last
            step only.
    """

    def __init__(
        self,
        features: nn.Module,
        reference: str,
        num_classes: int,
        samples: int = 50_000,
        guidance_scale: float | None = None,
        batch_size: int = 250,
        every_n_steps: int = 0,
    ) -> None:
        self.features, self.reference, self.num_classes = feature_network(features), Path(reference), num_classes
        self.samples, self.guidance_scale, self.batch_size = samples, guidance_scale, batch_size
        self.every_n_steps = every_n_steps

    @torch.no_grad()
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Sample and read on all processes, measure, log, print, write."""
        if trainer.sanity_checking:
            return
        if not is_due(trainer, self.every_n_steps):
            forget_metrics(trainer, *LOGGED.values())
            return
        references = open_images(self.reference)
        statistics = reference_gaussians(references, self.features.is_inception)
        evaluator = ImageEvaluator(GFID_ADM, self.features, statistics=statistics, device=pl_module.device)
        rank, world_size = trainer.global_rank, trainer.world_size
        for indices in torch.arange(rank, self.samples, world_size, device=pl_module.device).split(self.batch_size):
            images = pl_module.sample(indices % self.num_classes, indices, guidance_scale=self.guidance_scale)
            evaluator.update(to_uint8(images), indices)
        starts = np.arange(0, len(references), self.batch_size)
        for number, (start, images) in enumerate(zip(starts, references.batches(self.batch_size), strict=True)):
            if number % world_size == rank:
                evaluator.update(images, start + torch.arange(len(images)), is_reference=True)
        measurement = evaluator.compute(self.samples, len(references))
        for name, value in measurement.values.items():
            pl_module.log(LOGGED[name], value, rank_zero_only=True)
        rank_zero_info(str(measurement))
        where = {"reference_path": str(self.reference), "guidance_scale": self.guidance_scale}
        write_measurement(trainer, pl_module, measurement, where)

    on_test_epoch_end = on_validation_epoch_end
