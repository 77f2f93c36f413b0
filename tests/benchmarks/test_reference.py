"""The suite's version of each hot path computes what the plain version computes."""

import pytest
import torch
from torch import Tensor, nn

from benchmarks.speed import reference
from maetok import SiT, Tokenizer
from maetok.flow import Euler, sample
from maetok.networks import MaskedAutoencoder, TransformerSize
from maetok.training.ema import EMA

SIZE = TransformerSize(64, 3, 4)


def tokenizer(modulated: bool) -> Tokenizer:
    return Tokenizer((48, 32), 8, 6, encoder=SIZE, decoder=SIZE, latent_modulation=modulated, register_tokens=2)


def denoiser() -> SiT:
    model = SiT(16, 8, 10, SIZE).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    return model


def assert_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("modulated", [False, True])
def test_autoencoder_and_its_gradients(modulated: bool) -> None:
    model = MaskedAutoencoder(tokenizer(modulated), {})
    images, mask = torch.randn(2, 3, 48, 32), torch.rand(2, 24) < 0.5
    gradients = []
    for call in (lambda: reference.autoencode(model, images, mask), lambda: model(images, mask).reconstructions):
        output = call()
        model.zero_grad()
        output.square().mean().backward()
        gradients.append((output.detach(), *(p.grad for p in model.parameters() if p.grad is not None)))
    assert len(gradients[0]) == len(gradients[1]) > 60
    for found, expected in zip(*gradients, strict=True):
        assert_same(found, expected)


def test_encode_and_decode() -> None:
    model = tokenizer(False).eval()
    images, latents = torch.randn(2, 3, 48, 32), torch.randn(2, 6, model.latent_channels)
    assert_same(reference.encode(model, images), model.encode(images))
    assert_same(reference.decode(model, latents), model.decode(latents))


def test_velocity() -> None:
    model = denoiser()
    x, t, labels = torch.randn(3, 16, 8), torch.rand(3), torch.tensor([0, 4, 10])
    assert_same(reference.velocity(model, x, t, labels), model(x, t, labels))


def test_sampling_with_an_interval_of_guidance_and_the_rows_it_takes() -> None:
    model, rows = denoiser(), []
    labels, noise = torch.tensor([3, 7]), torch.randn(2, 16, 8)
    model.input.register_forward_hook(lambda _module, inputs, _output: rows.append(len(inputs[0])))
    plain = reference.sample(model, labels, noise, 4, 2.0, (0.0, 0.6))
    assert rows == [4, 4, 8, 8]
    rows.clear()
    own = sample(model, labels, noise, Euler(4), guidance_scale=2.0, guidance_interval=(0.0, 0.6))
    assert rows == [2, 2, 4, 4]
    assert_same(plain, own)


def test_update() -> None:
    networks = [nn.Linear(5, 3) for _ in range(2)]
    networks[1].load_state_dict(networks[0].state_dict())
    averages = [EMA(network, 0.5) for network in networks]
    optimizers = [torch.optim.AdamW(network.parameters(), lr=0.1) for network in networks]
    inputs = torch.randn(4, 5)
    for _ in range(3):
        for network in networks:
            network(inputs).square().sum().backward()
        reference.update(networks[0], optimizers[0], averages[0].network, 0.5)
        nn.utils.clip_grad_norm_(networks[1].parameters(), 1.0, foreach=True)
        optimizers[1].step()
        optimizers[1].zero_grad()
        averages[1].update(networks[1], 1000)
    for first, second in ((networks[0], networks[1]), (averages[0], averages[1])):
        for found, expected in zip(first.parameters(), second.parameters(), strict=True):
            assert_same(found, expected)
