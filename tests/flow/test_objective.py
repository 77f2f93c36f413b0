"""The flow matching loss, against published numbers and closed forms."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from maetok.flow import (
    CosineInterpolant,
    FlowObjective,
    Interpolant,
    LinearInterpolant,
    LogNormalTime,
    MinSNRWeighting,
    UniformTime,
)
from maetok.networks import SiT
from tests.conftest import DATA

PATHS = {"linear": LinearInterpolant(), "cosine": CosineInterpolant()}


def draw(rows: int = 6) -> dict[str, Tensor]:
    data, noise = torch.randn(2, rows, 4, 3)
    return {"data": data, "noise": noise, "condition": torch.arange(rows)}


def wrong(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    return torch.sin(3 * x) + t[:, None, None] + labels[:, None, None]


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("time", ["uniform", "lognormal"])
@torch.no_grad()
def test_published_losses(name: str, time: str) -> None:
    golden = load_file(DATA / "sit_small" / "io.safetensors")
    record = {key: golden[f"loss.{name}.{time}.{key}"] for key in ("t", "noise", "v_pred", "loss")}
    denoiser = SiT.from_pretrained(DATA / "sit_small").eval()
    predictions = []

    def remember(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        predictions.append(denoiser(x, t, labels))
        return predictions[-1]

    arguments = (golden["loss.latents"], record["noise"], record["t"], golden["loss.y"])
    losses = FlowObjective(PATHS[name]).losses_at(remember, *arguments)
    torch.testing.assert_close(predictions[0], record["v_pred"], atol=6e-6, rtol=0)
    torch.testing.assert_close(losses, record["loss"], atol=6e-6, rtol=0)


def test_published_training_step() -> None:
    """Loss, dropped labels and gradients of one step in training mode."""
    path = DATA / "sit_small" / "io.safetensors"
    golden, denoiser = load_file(path), SiT.from_pretrained(DATA / "sit_small").train()
    data = golden["loss.latents"]
    with safe_open(path, "pt") as file:
        torch.manual_seed(json.loads(file.metadata()["config"])["train_seed"])
    uniform, noise, dropping = torch.rand(4, 1, 1).flatten(), torch.randn_like(data), torch.rand(4)
    labels = torch.where(dropping < 0.1, denoiser.num_classes, golden["loss.y"])
    assert torch.equal(dropping < 0.1, golden["train.label_dropped"])
    losses, terms = FlowObjective(time=UniformTime()).loss(denoiser, data, noise, uniform, labels)
    torch.testing.assert_close(losses, golden["train.loss"], atol=6e-6, rtol=0)
    torch.testing.assert_close(terms["velocity_mse"], golden["train.loss"].mean(), atol=6e-6, rtol=0)
    losses.mean().backward()
    gradient = denoiser.final_layer.linear.weight.grad
    torch.testing.assert_close(gradient, golden["train.grad.final_layer.linear.weight"], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("path", PATHS.values())
def test_loss_is_the_plain_formula(path: Interpolant) -> None:
    batch, uniform, time = draw(), torch.rand(6), LogNormalTime(shift=2.0)
    losses, terms = FlowObjective(path, time, cosine_weight=0.5).loss(wrong, uniform=uniform, **batch)
    t = time(uniform, path)
    target = path.velocity(batch["data"], batch["noise"], t)
    prediction = wrong(path.interpolate(batch["data"], batch["noise"], t), t, batch["condition"])
    squared = (prediction - target).square().mean((1, 2))
    distance = (1 - (F.normalize(prediction, dim=-1) * F.normalize(target, dim=-1)).sum(-1)).mean(1)
    torch.testing.assert_close(losses, squared + 0.5 * distance)
    torch.testing.assert_close(terms["velocity_mse"], squared.mean())
    torch.testing.assert_close(terms["cosine_distance"], distance.mean())
    assert list(FlowObjective(path).loss(wrong, uniform=uniform, **batch)[1]) == ["velocity_mse"]


def test_the_true_velocity_costs_nothing() -> None:
    batch = draw()
    objective = FlowObjective(cosine_weight=1.0, weighting=MinSNRWeighting())
    losses, _ = objective.loss(lambda x, t, labels: batch["noise"] - batch["data"], uniform=torch.rand(6), **batch)
    torch.testing.assert_close(losses, torch.zeros(6), atol=1e-6, rtol=0)


@pytest.mark.parametrize("path", PATHS.values())
def test_min_snr_weights_are_those_of_predicted_data(path: Interpolant) -> None:
    """Their definition: the squared error of the data has weight min(SNR, gamma) (arXiv 2303.09556)."""
    batch, t = draw(), torch.linspace(0.05, 0.95, 6)
    x = path.interpolate(batch["data"], batch["noise"], t)
    noise = path.noise_from_velocity(wrong(x, t, batch["condition"]), x, t)
    alpha, sigma = path.alpha(t)[:, None, None], path.sigma(t)[:, None, None]
    error = (x - sigma * noise) / alpha - batch["data"]
    snr = (path.alpha(t) / path.sigma(t)).square()
    expected = snr.clamp(max=5.0) * error.square().mean((1, 2))
    losses = FlowObjective(path, weighting=MinSNRWeighting(5.0)).losses_at(wrong, t=t, **batch)
    torch.testing.assert_close(losses, expected)
    ends = MinSNRWeighting()(path, torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(ends, torch.zeros(2), atol=1e-12, rtol=0)


def test_losses_are_float32_and_carry_gradients() -> None:
    batch = draw()
    weight = torch.ones((), requires_grad=True)
    seen = []

    def half(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        seen.append((x.dtype, t.dtype))
        return (x * weight).bfloat16()

    batch["data"] = batch["data"].bfloat16()
    losses, terms = FlowObjective(cosine_weight=1.0).loss(half, uniform=torch.rand(6), **batch)
    assert losses.dtype == torch.float32
    assert seen == [(torch.bfloat16, torch.float32)]
    losses.sum().backward()
    assert weight.grad is not None
    assert weight.grad.abs() > 0
    assert not any(term.requires_grad for term in terms.values())


def test_wrong_arguments_are_named() -> None:
    batch = draw()
    with pytest.raises(ValueError, match="expected"):
        FlowObjective().losses_at(wrong, t=torch.rand(6, 1, 1), **batch)
    with pytest.raises(ValueError, match="denoiser returns"):
        FlowObjective().losses_at(lambda x, t, labels: x[:, :1], t=torch.rand(6), **batch)
    with pytest.raises(ValueError, match="cosine_weight=-1"):
        FlowObjective(cosine_weight=-1.0)
    with pytest.raises(ValueError, match="gamma=0"):
        MinSNRWeighting(0.0)
