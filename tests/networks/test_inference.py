"""Networks made ready for inference compute what they computed before."""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from maetok import LightningDiT, SiT, Tokenizer
from maetok.networks import TransformerSize
from maetok.networks.inference import PackedLinear, lower_weights, multiplied_by_onednn, prepare_for_inference
from maetok.runtime.cpu import use_fast_float32

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


EXACT = ("lightning-dit", "lightning-dit, qk-norm")
"""Their blocks have no GELU, which is computed before numbers are rounded."""


@pytest.fixture
def float32_by_onednn() -> Iterator[bool]:
    """Ask for it as tasks do on a CPU; whether this one does."""
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    yield use_fast_float32()
    matmul.fp32_precision = before


def open_network(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    network, inputs = NETWORKS[name]()
    for parameter in network.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)  # no gate is closed
    return network.eval(), inputs


def packed_layers(network: nn.Module) -> int:
    return sum(isinstance(module, PackedLinear) for module in network.modules())


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_weights_in_bfloat16_give_what_autocast_gives(name: str) -> None:
    network, inputs = open_network(name)
    lowered = copy.deepcopy(network)
    lower_weights(lowered, setattr)
    with torch.autocast("cpu", torch.bfloat16):
        expected = network(*inputs)
        assert torch.equal(lowered(*inputs), expected)
    assert (network(*inputs) - expected).abs().max() > 1e-4  # it did compute in bfloat16


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_bfloat16_is_as_close_to_float32_as_autocast(name: str) -> None:
    network, inputs = open_network(name)
    exact = network(*inputs)
    prepared = copy.deepcopy(network)
    prepare_for_inference(prepared, bfloat16=True)
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = network(*inputs), prepared(*inputs)
    if name in EXACT:
        assert torch.equal(found, expected)
    else:
        assert (found - exact).norm() < 1.1 * (expected - exact).norm()


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_float32_stays_float32(name: str, float32_by_onednn: bool) -> None:
    network, inputs = open_network(name)
    expected = network(*inputs)
    prepare_for_inference(network, bfloat16=False)
    assert (packed_layers(network) >= 4) == float32_by_onednn
    torch.testing.assert_close(network(*inputs), expected, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 257])
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_packed_layer_computes_the_same_bits(
    dtype: torch.dtype, rows: int, bias: bool, float32_by_onednn: bool
) -> None:
    linear, inputs = nn.Linear(768, 200, bias, dtype=dtype), torch.randn(2, rows, 768, dtype=dtype)
    if multiplied_by_onednn(linear.weight):
        assert torch.equal(PackedLinear(linear)(inputs), linear(inputs))
    else:
        assert dtype == torch.bfloat16 or not float32_by_onednn


@pytest.mark.parametrize(("approximate", "other"), [("none", "tanh"), ("tanh", "none")])
@torch.no_grad()
def test_gelu_of_a_packed_layer(approximate: str, other: str) -> None:
    linear, inputs = nn.Linear(64, 48), 3 * torch.randn(5, 64)
    found = PackedLinear(linear, nn.GELU(approximate))(inputs)
    torch.testing.assert_close(found, nn.GELU(approximate)(linear(inputs)), atol=2e-6, rtol=2e-6)
    assert (found - nn.GELU(other)(linear(inputs))).abs().max() > 1e-5


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("bfloat16", [False, True])
@torch.no_grad()
def test_weights_come_back(name: str, bfloat16: bool, float32_by_onednn: bool) -> None:
    network, inputs = open_network(name)
    before, expected = copy.deepcopy(network.state_dict()), network(*inputs)
    undo = prepare_for_inference(network, bfloat16)
    again = prepare_for_inference(network, bfloat16)  # of which nothing is left to do but lower what is lowered
    again()
    undo()
    assert packed_layers(network) == 0
    after = network.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) and after[key].dtype == value.dtype for key, value in before.items())
    assert torch.equal(network(*inputs), expected)


def test_what_is_in_no_block_stays_float32() -> None:
    network = SiT(16, 8, 10, SIZE)
    prepare_for_inference(network, bfloat16=True)
    for name, parameter in network.named_parameters():
        expected = torch.bfloat16 if name.startswith("blocks.") else torch.float32
        assert parameter.dtype == expected, name


def test_compiled_blocks_are_not_packed() -> None:
    network = SiT(16, 8, 10, SIZE)
    network.compile_blocks()
    prepare_for_inference(network, bfloat16=True)
    assert packed_layers(network) == 0
    assert network.blocks[0].mlp.fc1.weight.dtype == torch.bfloat16
