"""Weights kept in bfloat16 give what autocast gives, bit for bit."""

import copy

import pytest
import torch
from torch import Tensor, nn

from maetok import LightningDiT, SiT, Tokenizer
from maetok.inference import keep_bfloat16_weights
from maetok.networks import TransformerSize

SIZE = TransformerSize(64, 2, 4)


def denoiser_inputs() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(3, 16, 8), torch.rand(3), torch.tensor([0, 4, 10])


NETWORKS = {
    "sit": lambda: (SiT(16, 8, 10, SIZE), denoiser_inputs()),
    "sit, qk-norm": lambda: (SiT(16, 8, 10, SIZE, qk_norm=True), denoiser_inputs()),
    "lightning-dit": lambda: (LightningDiT(16, 8, 10, SIZE), denoiser_inputs()),
    "lightning-dit, qk-norm": lambda: (LightningDiT(16, 8, 10, SIZE, qk_norm=True), denoiser_inputs()),
    "tokenizer": lambda: (Tokenizer(32, 8, 6, encoder=SIZE, decoder=SIZE), (torch.randn(2, 3, 32, 32),)),
    "tokenizer, modulated": lambda: (
        Tokenizer(32, 8, 6, encoder=SIZE, decoder=SIZE, latent_modulation=True),
        (torch.randn(2, 3, 32, 32),),
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_outputs_are_those_of_autocast(name: str) -> None:
    network, inputs = NETWORKS[name]()
    network.eval()
    for parameter in network.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)  # no gate is closed
    lowered = copy.deepcopy(network)
    keep_bfloat16_weights(lowered)
    with torch.autocast("cpu", torch.bfloat16):
        expected = network(*inputs)
        assert torch.equal(lowered(*inputs), expected)
    assert (network(*inputs) - expected).abs().max() > 1e-4  # it did compute in bfloat16


def test_what_is_in_no_block_stays_float32() -> None:
    network = SiT(16, 8, 10, SIZE)
    keep_bfloat16_weights(network)
    for name, parameter in network.named_parameters():
        expected = torch.bfloat16 if name.startswith("blocks.") else torch.float32
        assert parameter.dtype == expected, name
