"""Paths, and the times that training draws on them."""

import json

import pytest
import torch
from safetensors import safe_open
from scipy import stats

from maetok.flow import (
    CosineInterpolant,
    Interpolant,
    LinearInterpolant,
    LogitNormalTime,
    LogNormalTime,
    TimeSampling,
    UniformTime,
    shift_time,
)
from maetok.flow.time_sampling import standard_normal
from tests.conftest import DATA

PATHS = {"linear": LinearInterpolant(), "cosine": CosineInterpolant()}


def draw(rows: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    data, noise = torch.randn(2, rows, 4, 3, dtype=torch.float64)
    return data, noise, torch.rand(rows, dtype=torch.float64) * 0.9 + 0.05


@pytest.mark.parametrize("path", PATHS.values())
def test_velocity_is_the_derivative_of_the_path(path: Interpolant) -> None:
    data, noise, t = draw()
    step = 1e-5
    difference = path.interpolate(data, noise, t + step) - path.interpolate(data, noise, t - step)
    torch.testing.assert_close(difference / (2 * step), path.velocity(data, noise, t), atol=1e-8, rtol=0)


@pytest.mark.parametrize("path", PATHS.values())
def test_path_goes_from_data_to_noise(path: Interpolant) -> None:
    data, noise, t = draw()
    torch.testing.assert_close(path.interpolate(data, noise, torch.zeros_like(t)), data)
    torch.testing.assert_close(path.interpolate(data, noise, torch.ones_like(t)), noise)


@pytest.mark.parametrize("path", PATHS.values())
def test_noise_and_score_come_back_from_the_velocity(path: Interpolant) -> None:
    data, noise, t = draw()
    x, velocity = path.interpolate(data, noise, t), path.velocity(data, noise, t)
    torch.testing.assert_close(path.noise_from_velocity(velocity, x, t), noise)
    # the published form of the score (tests/data/README.md)
    coefficients = (path.alpha, path.sigma, path.alpha_derivative, path.sigma_derivative)
    alpha, sigma, alpha1, sigma1 = (coefficient(t)[:, None, None] for coefficient in coefficients)
    score = ((alpha / alpha1) * velocity - x) / (sigma**2 - (alpha / alpha1) * sigma1 * sigma)
    torch.testing.assert_close(path.score_from_velocity(velocity, x, t), score)


@pytest.mark.parametrize("path", PATHS.values())
def test_score_of_gaussian_data(path: Interpolant) -> None:
    """For data N(0, s^2) the mean velocity is known, and so is the score -x / (alpha^2 s^2 + sigma^2)."""
    s, t = 0.3, torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    x = torch.linspace(-2, 2, 5, dtype=torch.float64).expand(3, 5)
    alpha, sigma = path.alpha(t), path.sigma(t)
    variance = alpha**2 * s**2 + sigma**2
    slope = (alpha * path.alpha_derivative(t) * s**2 + sigma * path.sigma_derivative(t)) / variance
    score = path.score_from_velocity(slope[:, None] * x, x, t)
    torch.testing.assert_close(score[1:], (-x / variance[:, None])[1:])
    assert not score[0].isfinite().all()


@pytest.mark.parametrize("path", PATHS.values())
def test_scalar_times_and_ratios(path: Interpolant) -> None:
    data, noise, _ = draw()
    t = torch.tensor(0.3, dtype=torch.float64)
    torch.testing.assert_close(path.interpolate(data, noise, t), path.interpolate(data, noise, t.expand(5)))
    times = torch.linspace(0, 0.99, 7, dtype=torch.float64)
    torch.testing.assert_close(path.time_at_ratio(path.sigma(times) / path.alpha(times)), times)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("time", ["uniform", "lognormal"])
def test_published_times_and_paths(name: str, time: str) -> None:
    with safe_open(DATA / "sit_small" / "io.safetensors", "pt") as file:
        seed = json.loads(file.metadata()["config"])["loss_seeds"][f"loss.{name}.{time}"]
        golden = {key: file.get_tensor(f"loss.{name}.{time}.{key}") for key in ("t", "noise", "x_t", "v_target")}
        latents = file.get_tensor("loss.latents")
    torch.manual_seed(seed)
    if time == "uniform":
        sampling: TimeSampling = UniformTime()
        uniform = torch.rand(4, 1, 1).flatten()
    else:
        sampling = LogNormalTime()
        uniform = torch.special.ndtr(torch.randn(4, 1, 1).flatten().double())
    noise = torch.randn_like(latents)
    torch.testing.assert_close(sampling(uniform, PATHS[name]).float(), golden["t"], atol=1e-6, rtol=0)
    torch.testing.assert_close(noise, golden["noise"], atol=1e-6, rtol=0)
    path = PATHS[name]
    torch.testing.assert_close(path.interpolate(latents, noise, golden["t"]), golden["x_t"], atol=1e-6, rtol=0)
    torch.testing.assert_close(path.velocity(latents, noise, golden["t"]), golden["v_target"], atol=1e-6, rtol=0)


def test_distributions_of_times() -> None:
    uniform = torch.rand(4000)
    t = LogitNormalTime(mean=-0.5, std=0.7)(uniform)
    assert stats.kstest(torch.logit(t).numpy(), "norm", (-0.5, 0.7)).pvalue > 0.01
    ratio = torch.tan(LogNormalTime(mean=0.4, std=1.2)(uniform, CosineInterpolant()) * torch.pi / 2)
    assert stats.kstest(ratio.log().numpy(), "norm", (0.4, 1.2)).pvalue > 0.01
    torch.testing.assert_close(LogNormalTime()(uniform), LogitNormalTime()(uniform))
    assert torch.equal(UniformTime()(uniform), uniform)


@pytest.mark.parametrize("path", PATHS.values())
@pytest.mark.parametrize("sampling", [UniformTime(shift=3.0), LogitNormalTime(std=2.0), LogNormalTime()])
def test_extreme_uniform_numbers_give_times(sampling: TimeSampling, path: Interpolant) -> None:
    t = sampling(torch.tensor([0.0, 2.0**-24, 0.5, 1 - 2.0**-24]), path)
    assert t.dtype == torch.float32
    assert t.isfinite().all()
    assert (t.diff() > 0).all()
    assert t.min() >= 0
    assert t.max() <= 1


def test_normal_numbers_are_finite() -> None:
    normal = standard_normal(torch.tensor([0.0, 0.25, 0.5, 1 - 2.0**-24]))
    torch.testing.assert_close(
        normal, torch.tensor([-5.42, -0.67449, 0.0, 5.29], dtype=torch.float64), atol=0.01, rtol=0
    )


def test_shift() -> None:
    t = torch.linspace(0, 1, 9, dtype=torch.float64)
    torch.testing.assert_close(shift_time(shift_time(t, 3.0), 1 / 3.0), t)
    assert torch.equal(shift_time(t, 1.0), t)
    assert shift_time(torch.tensor(0.5), 3.0).item() == pytest.approx(0.75)  # 1.5 / 2
    torch.testing.assert_close(1 - shift_time(1 - t, 3.0), shift_time(t, 1 / 3.0))  # t = 1 being data
    torch.testing.assert_close(UniformTime(shift=3.0)(t), shift_time(t, 3.0))
    with pytest.raises(ValueError, match="shift=0"):
        UniformTime(shift=0.0)
    with pytest.raises(ValueError, match="std=0"):
        LogitNormalTime(std=0.0)
