"""Short training of a small SiT on latents: an early sign of how well stage 3 will do with a tokenizer."""

import numpy as np
import torch
from torch import Tensor

from maetok.flow import FlowObjective, index_noise
from maetok.formats.channel_moments import ChannelMoments
from maetok.networks import SiT, TransformerSize

SIZE = TransformerSize(width=64, depth=2, num_heads=4)
BATCH_SIZE, LEARNING_RATE = 64, 4e-3
TIME_BINS = 10
SEED = 0
"""These are constants, so that losses of different steps and runs compare."""


def short_diffusion_loss(
    train_latents: np.ndarray,
    train_labels: np.ndarray,
    test_latents: np.ndarray,
    test_labels: np.ndarray,
    steps: int = 300,
    device: torch.device | str = "cpu",
) -> float:
    """Return the mean squared velocity error on held-out latents of a small SiT trained from scratch.

    Latents are normalised per channel by the training latents, so a network that predicts 0 has a loss of 2. The same
    latents give the same loss in any state of torch's global random generators, and inside ``no_grad`` and
    ``inference_mode``. The state of the generators does not change.

    Args:
        train_latents: raw latents (n, L, C), float32.
        train_labels: (n,) class indices.
        test_latents: held-out raw latents (m, L, C).
        test_labels: (m,) class indices.
        steps: steps of Adam, over which the learning rate falls linearly to 0.
        device: to train on.

    Returns:
        The mean over held-out latents, each at the middle of one of ten time bins, as in the validation of stage 3.

    Raises:
        ValueError: if steps is less than 1.
    """
    if steps < 1:
        raise ValueError(f"steps={steps} of the short diffusion must be at least 1")
    num_classes = int(max(train_labels.max(), test_labels.max())) + 1
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        tokens, channels = train_latents.shape[1:]
        denoiser = SiT(tokens, channels, num_classes, SIZE).to(device)
        train, test = (torch.from_numpy(latents).to(device) for latents in normalized(train_latents, test_latents))
        with torch.enable_grad():
            train_shortly(denoiser, train, torch.from_numpy(train_labels).to(device), steps)
        with torch.no_grad():
            return held_out_loss(denoiser, test, torch.from_numpy(test_labels).to(device))


def normalized(train_latents: np.ndarray, test_latents: np.ndarray) -> list[np.ndarray]:
    """Normalise both (..., C) by the moments of the first, to float32; a channel that does not vary becomes 0."""
    moments = ChannelMoments.of(train_latents)
    std = np.where(moments.std > 0, moments.std, np.inf)
    return [((latents - moments.mean) / std).astype(np.float32) for latents in (train_latents, test_latents)]


def train_shortly(denoiser: SiT, latents: Tensor, labels: Tensor, steps: int) -> None:
    """Train with Adam on normalised latents (n, L, C) with labels (n,); all random numbers come from the CPU."""
    objective = FlowObjective()
    optimizer = torch.optim.Adam(
        [parameter for parameter in denoiser.parameters() if parameter.requires_grad], LEARNING_RATE
    )
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(steps):
        chosen = torch.randint(len(latents), (BATCH_SIZE,)).to(latents.device)
        noise = torch.randn(BATCH_SIZE, *latents.shape[1:]).to(latents.device)
        uniform = torch.rand(BATCH_SIZE).to(latents.device)
        losses, _ = objective.loss(denoiser, latents[chosen], noise, uniform, labels[chosen])
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
        schedule.step()


def held_out_loss(denoiser: SiT, latents: Tensor, labels: Tensor) -> float:
    """Return the mean loss of normalised latents (m, L, C), sample i at the middle of time bin i mod ``TIME_BINS``."""
    objective, losses = FlowObjective(), []
    for rows in torch.arange(len(latents), device=latents.device).split(1000):
        noise = index_noise(SEED, rows, shape=latents.shape[1:])
        times = (rows % TIME_BINS + 0.5) / TIME_BINS
        losses.append(objective.losses_at(denoiser, latents[rows], noise, times, labels[rows]))
    return float(torch.cat(losses).mean())
