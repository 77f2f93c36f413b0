"""Solvers, against published samples and differential equations with a known solution."""

import json
import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from maetok.flow import (
    CosineInterpolant,
    Dopri5,
    Euler,
    EulerMaruyama,
    GuidedVelocity,
    Heun,
    Interpolant,
    LinearInterpolant,
    Solver,
    index_noise,
    sample,
    time_grid,
)
from maetok.networks import SiT
from tests.conftest import DATA

FOLDER = DATA / "sit_sampler"
SOLVERS: dict[str, tuple[Solver, Interpolant]] = {
    "euler": (Euler(8), LinearInterpolant()),
    "heun": (Heun(8), LinearInterpolant()),
    "em_linear": (EulerMaruyama(8), LinearInterpolant()),
    "em_cosine": (EulerMaruyama(8), CosineInterpolant()),
}


def published_runs() -> dict[str, dict]:
    with safe_open(FOLDER / "sampler.safetensors", "pt") as file:
        return json.loads(file.metadata()["config"])["sampler"]["runs"]


def test_all_published_runs_are_here() -> None:
    assert len(published_runs()) == 12


@pytest.mark.parametrize("name", sorted(published_runs()))
@torch.no_grad()
def test_published_samples(name: str) -> None:
    golden, run = load_file(FOLDER / "sampler.safetensors"), published_runs()[name]
    denoiser = SiT.from_pretrained(FOLDER).eval()
    times, rows, dtypes = [], [], set()

    def remember(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        times.append(t[0].item())
        rows.append(len(x))
        dtypes.add(x.dtype)
        return denoiser(x, t, labels)

    interval = (run["guidance_low"], run["guidance_high"])
    velocity = GuidedVelocity(remember, golden["y"], run["cfg_scale"], interval, denoiser.num_classes)
    step_noise = golden["em.noise_per_step"].__getitem__
    solver, path = SOLVERS[name.split(".", maxsplit=1)[0]]
    samples = solver(velocity, golden["latents"], step_noise, path)
    assert samples.dtype == torch.float64
    torch.testing.assert_close(samples, golden[name], atol=6e-6, rtol=0)
    assert rows == run["model_batches"]
    assert times == pytest.approx(run["model_times"], abs=1e-7)
    assert dtypes == {torch.float32}


@torch.no_grad()
def test_published_sample_through_the_front_door() -> None:
    golden, denoiser = load_file(FOLDER / "sampler.safetensors"), SiT.from_pretrained(FOLDER).eval()
    samples = sample(
        denoiser,
        golden["y"],
        golden["latents"],
        EulerMaruyama(),
        steps=8,
        guidance_scale=2.5,
        interpolant=CosineInterpolant(),
        guidance_interval=(0.1, 0.8),
        step_noise=lambda step: golden["em.noise_per_step"][step],
    )
    torch.testing.assert_close(samples, golden["em_cosine.cfg2.5.int0.1-0.8"].float(), atol=6e-6, rtol=0)


def linear_field(x: Tensor, t: float, decided_at: float | None = None) -> Tensor:
    """dx/dt = (2 + cos t) x, solved by x(0) = x(1) exp(-2 - sin 1)."""
    return (2.0 + math.cos(t)) * x


def error(solver: Solver) -> float:
    exact = math.exp(-2.0 - math.sin(1.0))
    return abs(solver(linear_field, torch.ones(1, 1, 1)).item() - exact)


@pytest.mark.parametrize(("kind", "order"), [(Euler, 1), (Heun, 2)])
@pytest.mark.parametrize("shift", [1.0, 2.0])
def test_order_of_convergence(kind: type, order: int, shift: float) -> None:
    ratio = error(kind(100, shift)) / error(kind(200, shift))
    assert math.log2(ratio) == pytest.approx(order, abs=0.1)


def test_adaptive_solver_keeps_its_tolerance() -> None:
    assert error(Dopri5()) < 1e-3
    assert error(Dopri5(rtol=1e-8, atol=1e-10)) < 1e-8


def test_adaptive_solver_stops_at_the_edges_of_guidance() -> None:
    """dx/dt = 1, but 3 between 0.3 and 0.7: the jump costs no step and no accuracy."""
    calls = []

    def denoiser(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        calls.append(t[0].item())
        return torch.where(labels == 1, 0.0, 1.0)[:, None, None].expand_as(x)

    velocity = GuidedVelocity(denoiser, torch.zeros(2, dtype=torch.int64), 3.0, (0.3, 0.7), null_condition=1)
    samples = Dopri5()(velocity, torch.zeros(2, 1, 1))
    torch.testing.assert_close(samples, torch.full((2, 1, 1), -0.6 - 3 * 0.4, dtype=torch.float64))
    assert len(calls) < 100
    moment = GuidedVelocity(denoiser, torch.zeros(2, dtype=torch.int64), 3.0, (0.3, 0.3), null_condition=1)
    unguided = Dopri5()(moment, torch.zeros(2, 1, 1))
    torch.testing.assert_close(unguided, torch.full((2, 1, 1), -1.0, dtype=torch.float64))


def test_adaptive_error_is_that_of_the_worst_sample() -> None:
    """A hard sample among many easy ones is as exact as alone."""
    noise = torch.zeros(50, 1, 1, dtype=torch.float64)
    noise[0] = 1.0
    solver = Dopri5(rtol=1e-6, atol=1e-9)
    alone, together = solver(linear_field, noise[:1]), solver(linear_field, noise)
    assert together[0].item() == pytest.approx(alone.item(), rel=1e-12)


@pytest.mark.parametrize("path", [LinearInterpolant(), CosineInterpolant()])
def test_stochastic_solver_on_gaussian_data(path: Interpolant) -> None:
    """Data N(1, 0.5^2): the velocity is known, and samples have that mean and deviation."""
    mean, deviation = 1.0, 0.5

    def field(x: Tensor, t: float, decided_at: float | None = None) -> Tensor:
        time = torch.tensor(t, dtype=torch.float64)
        alpha, sigma = path.alpha(time), path.sigma(time)
        alpha1, sigma1 = path.alpha_derivative(time), path.sigma_derivative(time)
        slope = (alpha * alpha1 * deviation**2 + sigma * sigma1) / (alpha**2 * deviation**2 + sigma**2)
        return alpha1 * mean + slope * (x - alpha * mean)

    indices = torch.arange(2000)
    noise = index_noise(3, indices, -1, (4, 2))
    samples = EulerMaruyama(200, last=0.01)(field, noise, lambda step: index_noise(3, indices, step, (4, 2)), path)
    assert samples.mean().item() == pytest.approx(mean, abs=0.02)
    assert samples.std().item() == pytest.approx(deviation, abs=0.02)
    ode = Heun(50)(field, noise)
    assert ode.std().item() == pytest.approx(deviation, abs=0.01)
    assert abs(torch.corrcoef(torch.stack((samples.flatten(), ode.flatten())))[0, 1]) < 0.5  # noise was really added


@pytest.mark.parametrize("path", [LinearInterpolant(), CosineInterpolant()])
@pytest.mark.parametrize("solver", [Euler(3), Heun(3), EulerMaruyama(3)])
def test_the_state_stays_on_the_device_of_the_noise(solver: Solver, path: Interpolant) -> None:
    """The meta device refuses tensors of another one, as a GPU does."""
    noise, labels = torch.zeros(2, 4, 3, device="meta"), torch.zeros(2, dtype=torch.int64, device="meta")
    settings = {"guidance_scale": 2.0, "null_condition": 1, "interpolant": path, "step_noise": lambda step: noise}
    assert sample(lambda x, t, labels: x, labels, noise, solver, **settings).device.type == "meta"


def test_grids() -> None:
    assert time_grid(4) == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert time_grid(3, last=0.04) == pytest.approx([1.0, 0.52, 0.04, 0.0])
    assert time_grid(1, last=0.04) == [1.0, 0.0]
    assert time_grid(2, shift=3.0) == pytest.approx([1.0, 0.75, 0.0])
    shifted = time_grid(5, shift=3.0, last=0.04)
    assert len(shifted) == 6
    assert shifted[-2:] == pytest.approx([0.04, 0.0])
    assert shifted == sorted(shifted, reverse=True)


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ValueError, match="steps=0"):
        Euler(0)
    with pytest.raises(ValueError, match="steps=0"):
        Euler().with_steps(0)
    with pytest.raises(ValueError, match="shift=0"):
        Heun(shift=0.0)
    with pytest.raises(ValueError, match="last=0"):
        EulerMaruyama(last=0.0)
    with pytest.raises(ValueError, match="rtol=0"):
        Dopri5(rtol=0.0)
    with pytest.raises(ValueError, match="steps=8"):
        Dopri5().with_steps(8)
    with pytest.raises(ValueError, match="step_noise"):
        EulerMaruyama(8)(linear_field, torch.ones(1, 1, 1))
