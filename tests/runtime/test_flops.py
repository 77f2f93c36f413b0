"""Counted FLOPs against formulas, and peak rates."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from maetok.runtime import flops
from maetok.runtime.flops import FlopCounter, measured_peak, vendor_peak

BATCH, HEADS, TOKENS, DIM = 2, 3, 16, 8


def test_layers_cost_two_per_weight_and_row_and_twice_that_backward() -> None:
    network = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 5))
    with FlopCounter() as counter:
        network(torch.randn(7, 4)).sum().backward()
    assert counter.flops == 2 * 7 * (2 * 4 * 6 + 3 * 6 * 5)  # the input has no gradient
    assert counter.recomputed == 0


def test_a_convolution_by_hand() -> None:
    layer = nn.Conv2d(3, 5, 4, stride=4)
    with FlopCounter() as counter:
        layer(torch.randn(2, 3, 8, 8)).sum().backward()
    assert counter.flops == 2 * (2 * (2 * 2 * 2) * 5 * 3 * 4 * 4)  # forward, and backward to the weights


def plain_attention(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return (queries @ keys.transpose(-2, -1)).softmax(-1) @ values


@pytest.mark.parametrize(("attention", "products_again"), [(plain_attention, 0), (F.scaled_dot_product_attention, 1)])
def test_attention_costs_the_same_however_it_is_computed(attention: Callable[..., Tensor], products_again: int) -> None:
    queries, keys, values = (torch.randn(BATCH, HEADS, TOKENS, DIM, requires_grad=True) for _ in range(3))
    with FlopCounter() as counter:
        attention(queries, keys, values).sum().backward()
    product = 2 * BATCH * HEADS * TOKENS**2 * DIM
    assert counter.flops == 6 * product  # two forward, four backward
    assert counter.recomputed == products_again * product


def test_what_checkpointing_computes_again_is_counted_apart() -> None:
    first, second = nn.Linear(4, 6), nn.Linear(6, 6)
    inputs, counts = torch.randn(7, 4, requires_grad=True), []
    for recompute in (False, True):
        with FlopCounter() as counter:
            hidden = first(inputs)
            block = lambda x: second(second(x).relu()).exp()  # noqa: E731
            (checkpoint(block, hidden, use_reentrant=False) if recompute else block(hidden)).sum().backward()
        counts.append((counter.flops, counter.recomputed))
    model = 2 * 7 * (3 * 4 * 6 + 2 * 3 * 6 * 6)
    assert counts == [(model, 0), (model, 2 * 7 * 2 * 6 * 6)]


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_forward_passes_cost_the_same_with_and_without_gradients(
    context: Callable[[], AbstractContextManager[None]],
) -> None:
    layer, tokens = nn.Linear(DIM, DIM), torch.randn(BATCH, HEADS, TOKENS, DIM)
    with context(), FlopCounter() as counter:
        F.scaled_dot_product_attention(layer(tokens), tokens, tokens)
    assert counter.flops == 2 * BATCH * HEADS * TOKENS * DIM * DIM + 4 * BATCH * HEADS * TOKENS**2 * DIM


def test_counting_changes_neither_results_nor_random_numbers() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Dropout(0.5), nn.Linear(8 * 36, 9))
    images, results = torch.randn(4, 3, 8, 8), []
    for counter in (None, FlopCounter()):
        torch.manual_seed(0)
        network.zero_grad()
        if counter is not None:
            counter.__enter__()
        network(images).square().mean().backward()
        if counter is not None:
            counter.__exit__(None, None, None)
        results.append([*(parameter.grad for parameter in network.parameters()), torch.rand(3)])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize(("name", "dtype", "tf32", "peak"), [
    ("NVIDIA H100 80GB HBM3", torch.bfloat16, False, 989e12),
    ("NVIDIA H100 PCIe", torch.bfloat16, False, 756e12),
    ("NVIDIA H200", torch.float32, True, 494e12),
    ("NVIDIA A100-SXM4-80GB", torch.float32, False, 19.5e12),
    ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", torch.bfloat16, False, None),
    ("NVIDIA H100 NVL", torch.bfloat16, False, None),
    ("Some Other GPU", torch.bfloat16, False, None),
])  # fmt: skip
def test_peaks_of_known_devices(name: str, dtype: torch.dtype, tf32: bool, peak: float | None) -> None:
    assert vendor_peak(name, dtype, tf32) == peak


def test_a_measured_peak_is_the_fastest_of_products_that_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock by which three products of 128 rows take 4 ms, three of 256 rows 10 ms, and the next ones too long."""
    milliseconds = iter([0, 1, 0, 2, 0, 1, 0, 4, 0, 2, 0, 4, 0, 100, 0, 100, 0, 100])
    now = [0.0]

    def synchronize(device: torch.device) -> None:  # called before and after each product
        now[0] += next(milliseconds) / 1000

    monkeypatch.setattr(flops, "synchronize", synchronize)
    monkeypatch.setattr(flops, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    random = torch.get_rng_state()
    assert measured_peak(torch.device("cpu"), torch.float32) == pytest.approx(2 * 256**3 / 0.002, rel=1e-9)
    assert next(milliseconds, None) is None
    assert torch.equal(torch.get_rng_state(), random)
