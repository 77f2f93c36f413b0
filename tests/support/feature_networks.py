"""Small feature networks with known answers."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from maetok.metrics.evaluator import ImageEvaluator
from maetok.metrics.features import FeatureNetwork
from maetok.metrics.protocols import GFID_ADM, Measurement


class MeanColours(nn.Module):
    """Gives the mean of each channel in float64, so that the batch size does not matter."""

    num_features = 3

    def forward(self, images: Tensor) -> Tensor:
        return images.double().mean((2, 3))


class SmallInception(FeatureNetwork):
    """Gives all features that Inception gives, as float64 linear maps of 8 x 8 images; distances are called FID."""

    is_inception = True

    def __init__(self) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        for name, size in (("pool", 6), ("spatial", 5), ("logits", 4)):
            self.register_buffer(name, torch.randn(192, size, generator=rng) / 1000)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {name: images.flatten(1).double() @ matrix.double() for name, matrix in self.named_buffers()}


def pictures(count: int, seed: int = 0, size: int = 8) -> Tensor:
    """Return (count, 3, size, size) uint8 of various brightness."""
    rng = torch.Generator().manual_seed(seed)
    levels = torch.rand(count, 3, size, size, generator=rng) * torch.rand(count, 1, 1, 1, generator=rng)
    return (levels * 255).to(torch.uint8)


def share(rank: int, world_size: int) -> Measurement:
    """Measure one process's share of the samples; only the first process has references."""
    samples, references = pictures(61, seed=1), pictures(50, seed=2)
    evaluator = ImageEvaluator(replace(GFID_ADM, inception_score_split=20), SmallInception())
    for indices in torch.arange(rank, 61, world_size).split(8):
        evaluator.update(samples[indices], indices)
    if rank == 0:
        evaluator.update(references, torch.arange(50), is_reference=True)
    return evaluator.compute(61, 50)
