"""Sampling as a whole, and noise that depends on a sample's index alone."""

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from maetok.flow import Euler, EulerMaruyama, Heun, index_noise, sample
from maetok.flow.sampling import philox

SHAPE = (5, 3)


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return self.weight * torch.sin(x + labels[:, None, None]) + t[:, None, None]

    def without_condition(self, labels: Tensor) -> Tensor:
        return torch.full_like(labels, 10)


def noisy_sample(indices: Tensor, **settings: object) -> Tensor:
    return sample(
        Toy(),
        indices % 10,
        index_noise(7, indices, -1, SHAPE),
        EulerMaruyama(6),
        step_noise=lambda step: index_noise(7, indices, step, SHAPE),
        **settings,
    )


def test_samples_do_not_depend_on_the_batch() -> None:
    together = noisy_sample(torch.arange(7), guidance_scale=1.5)
    assert together.shape == (7, *SHAPE)
    assert together.dtype == torch.float32
    assert not together.requires_grad
    for split in ([0, 1, 2], [5, 3], [6]):
        torch.testing.assert_close(noisy_sample(torch.tensor(split), guidance_scale=1.5), together[split])


def test_arguments_reach_the_solver() -> None:
    noise, labels = torch.randn(3, *SHAPE), torch.arange(3)
    assert torch.equal(sample(Toy(), labels, noise, steps=5), sample(Toy(), labels, noise, Euler(5)))
    solver = Heun(3, shift=2.0)
    assert not torch.equal(sample(Toy(), labels, noise, solver, steps=5), sample(Toy(), labels, noise, solver))
    assert solver.steps == 3
    toy = Toy()
    guided = sample(toy, labels, noise, steps=5, guidance_scale=2.0)
    assert torch.equal(guided, sample(toy.forward, labels, noise, steps=5, guidance_scale=2.0, null_condition=10))
    assert torch.equal(
        sample(toy, labels, noise, steps=5, guidance_scale=2.0, guide=toy), sample(toy, labels, noise, steps=5)
    )


def test_missing_arguments_are_named() -> None:
    noise, labels = torch.randn(3, *SHAPE), torch.arange(3)
    with pytest.raises(ValueError, match="null condition"):
        sample(lambda x, t, labels: x, labels, noise, guidance_scale=2.0)
    with pytest.raises(ValueError, match="number of samples"):
        sample(Toy(), labels[:2], noise)
    with pytest.raises(ValueError, match="step_noise"):
        sample(Toy(), labels, noise, EulerMaruyama(4))


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (4 * (0xFFFFFFFF,), 2 * (0xFFFFFFFF,), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter: tuple, key: tuple, words: tuple) -> None:
    found = philox(tuple(torch.tensor([word] * 20) for word in counter), key)
    assert [set(word.tolist()) for word in found] == [{word} for word in words]


def test_noise_of_an_index_is_the_same_in_any_split() -> None:
    indices = torch.tensor([4, 0, 2**40 + 1, 9])
    together = index_noise(1, indices, 3, SHAPE)
    assert together.shape == (4, *SHAPE)
    assert together.dtype == torch.float32
    for place, index in enumerate(indices.tolist()):
        assert torch.equal(index_noise(1, [index], 3, SHAPE)[0], together[place])
    torch.manual_seed(1)
    assert torch.equal(index_noise(1, indices, 3, SHAPE), together)  # whatever the global generator does
    assert index_noise(1, [], 3, SHAPE).shape == (0, *SHAPE)
    assert torch.equal(index_noise(1, [4], 3, (17,))[0, :15].reshape(SHAPE), together[0])


def test_seed_index_step_and_place_all_matter() -> None:
    one = index_noise(1, [1], 1, (4096,))
    others = [
        index_noise(seed, [index], step, (4096,))
        for seed, index, step in ((2, 1, 1), (2**40 + 1, 1, 1), (1, 2, 1), (1, 2**33 + 1, 1), (1, 1, 2), (1, 1, -1))
    ]
    correlation = torch.corrcoef(torch.cat([one, *others, one.roll(1)]))
    assert (correlation - torch.eye(8)).abs().max() < 0.08  # five standard deviations of 1 / sqrt(4096)


def test_noise_is_standard_normal() -> None:
    """Over 100 seeds the significance of a Kolmogorov-Smirnov test is uniform, as it is for normal numbers."""
    significances = [
        stats.kstest(index_noise(seed, torch.arange(50), 0, (8, 25)).flatten().double().numpy(), "norm").pvalue
        for seed in range(100)
    ]
    assert stats.kstest(significances, "uniform").pvalue > 0.01
    noise = index_noise(0, torch.arange(4000), 0, (8, 2))
    assert noise.isfinite().all()
    assert noise.mean().item() == pytest.approx(0.0, abs=0.02)
    assert noise.var().item() == pytest.approx(1.0, abs=0.02)
    between_places = torch.corrcoef(noise.flatten(1).T) - torch.eye(16)
    assert between_places.abs().max() < 0.08  # five standard deviations of 1 / sqrt(4000)
    across_indices, across_steps = noise[:, 0, 0], torch.cat([index_noise(0, [5], step, (1,)) for step in range(400)])
    for numbers in (across_indices, across_steps.flatten()):
        assert stats.kstest(numbers.double().numpy(), "norm").pvalue > 0.01


def test_wrong_numbers_are_named() -> None:
    with pytest.raises(ValueError, match="seed=-1"):
        index_noise(-1, [0])
    with pytest.raises(ValueError, match="step=-2"):
        index_noise(0, [0], -2)
    with pytest.raises(ValueError, match="negative"):
        index_noise(0, [-3])
