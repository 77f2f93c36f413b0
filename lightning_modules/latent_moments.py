"""Mean and standard deviation of latents, to normalise them: measured on training images, or published."""

from functools import reduce
from itertools import chain

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from maetok.formats.channel_moments import ChannelMoments
from maetok.hub import published_latent_moments
from maetok.runtime.distributed import gather_over_ranks


@torch.no_grad()
def measured_moments(task: LightningModule, samples: int) -> tuple[Tensor, Tensor]:
    """Measure mean and standard deviation (C,) float64 of the latents of training images, over all processes.

    Args:
        task: has ``raw_latents(batch)`` and a trainer whose datamodule gives images.
        samples: number of training images to encode at most.
    """
    rank_zero_info(f"measuring the latents of up to {samples} training images")
    parts: list[ChannelMoments] = []
    for loaded in task.trainer.datamodule.evaluation_dataloader("train", samples):  # type: ignore[attr-defined]
        batch = task.trainer.strategy.batch_to_device(loaded)
        latents = task.raw_latents(batch)[batch["valid"]]  # type: ignore[operator]
        if len(latents):
            parts.append(ChannelMoments.of(latents.float().cpu().numpy()))
    merged = reduce(ChannelMoments.merge, chain(*gather_over_ranks(parts)))
    return torch.from_numpy(merged.mean), torch.from_numpy(merged.std)


def published_moments(path_or_repo: str, channels: int) -> list[Tensor]:
    """Return mean and standard deviation (C,) of a published model's latents.

    A single number for all channels, as some models publish it, is repeated.

    Raises:
        FileNotFoundError: if there is no such model.
        ValueError: if it brings no statistics.
    """
    return [value.expand(channels) if value.ndim == 0 else value for value in published_latent_moments(path_or_repo)]
