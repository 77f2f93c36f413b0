"""The short SiT gets a lower loss on simple latents, and does not change global state."""

import math

import numpy as np
import pytest
import torch

from maetok.analysis.short_diffusion import normalized, short_diffusion_loss

Samples = tuple[np.ndarray, np.ndarray]


def samples(count: int, seed: int, clusters: int | None) -> Samples:
    """Return latents (count, 4, 8) with unit variance per channel: isotropic noise, or tight clusters at signs."""
    rng = np.random.default_rng(seed)
    latents = rng.normal(size=(count, 4, 8))
    if clusters is not None:
        centres = np.where(np.random.default_rng(9).random((clusters, 4, 8)) < 0.5, -1.0, 1.0)
        latents = math.sqrt(0.99) * centres[rng.integers(0, clusters, count)] + 0.1 * latents
    return latents.astype(np.float32), rng.integers(0, 2, count)


def loss(clusters: int | None, steps: int) -> float:
    return short_diffusion_loss(*samples(1000, 0, clusters), *samples(1000, 1, clusters), steps=steps)


def test_few_tight_clusters_are_easier_than_noise_of_the_same_statistics() -> None:
    """The best loss on normal noise of unit variance is the integral of 1 / (t^2 + (1 - t)^2) over t: pi / 2."""
    noise, clusters = loss(None, 150), loss(3, 150)
    assert math.pi / 2 - 0.03 < noise < math.pi / 2 + 0.1
    assert clusters < 0.5 * noise


def test_result_is_the_same_anywhere_and_global_generators_stay_as_they_are() -> None:
    losses = []
    for context in (torch.enable_grad(), torch.no_grad(), torch.inference_mode()):
        torch.manual_seed(len(losses))
        before = torch.get_rng_state()
        with context:
            losses.append(loss(3, 5))
        assert torch.equal(torch.get_rng_state(), before)
    assert losses[0] == losses[1] == losses[2]
    assert losses[0] != loss(3, 6)


def test_scale_and_offset_of_channels_do_not_matter() -> None:
    train, test = samples(50, 0, 3), samples(30, 1, 3)
    factor, offset = np.float32(4.0 ** np.arange(-4, 4)), np.arange(8, dtype=np.float32)
    moved = [(latents * factor + offset, labels) for latents, labels in (train, test)]
    plain = short_diffusion_loss(*train, *test, steps=5)
    assert short_diffusion_loss(*moved[0], *moved[1], steps=5) == pytest.approx(plain, rel=1e-4)


def test_normalisation_is_that_of_the_training_latents() -> None:
    train, test = normalized(np.array([[[0.0, 5.0]], [[4.0, 5.0]]]), np.array([[[6.0, 7.0]]]))
    assert train.tolist() == [[[-1, 0]], [[1, 0]]]
    assert test.tolist() == [[[2, 0]]]
    assert train.dtype == np.float32


def test_no_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="steps=0 of the short diffusion must be at least 1"):
        loss(3, 0)
