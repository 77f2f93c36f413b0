"""Attention kernels agree with the formula; rotary angles have their closed form and their precision."""

import math

import pytest
import torch

from maetok.networks.layers.attention import (
    CPU_HAS_BFLOAT16,
    PLAIN_ATTENTION_MAX_TOKENS,
    Attention,
    attention,
    plain_is_faster,
)
from maetok.networks.layers.rope import MixedRotaryEmbedding2d, compute_dtype, rotate


def textbook_attention(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    scores = torch.einsum("bhtd,bhsd->bhts", queries, keys) / math.sqrt(queries.shape[-1])
    return torch.einsum("bhts,bhsd->bhtd", torch.exp(scores) / torch.exp(scores).sum(-1, keepdim=True), values)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)]
)
def test_attention_is_the_formula(dtype: torch.dtype, tolerance: float) -> None:
    queries, keys, values = torch.randn(3, 2, 4, 9, 8).unbind(0)
    result = attention(queries.to(dtype), keys.to(dtype), values.to(dtype))
    assert result.dtype == dtype
    expected = textbook_attention(queries.double(), keys.double(), values.double())
    torch.testing.assert_close(result.double(), expected, atol=tolerance, rtol=0)


def test_plain_formula_only_where_it_is_faster() -> None:
    most = PLAIN_ATTENTION_MAX_TOKENS
    assert most[torch.bfloat16] == (1024 if CPU_HAS_BFLOAT16 else 0)
    for dtype, tokens in most.items():
        assert not plain_is_faster("cpu", dtype, tokens + 1)
        assert not plain_is_faster("cuda", dtype, 64)
    assert plain_is_faster("cpu", torch.float32, 512)
    assert not plain_is_faster("cpu", torch.float16, 64)


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_both_kernels_give_the_formula_in_bfloat16(
    monkeypatch: pytest.MonkeyPatch, plain: bool, autocast: bool
) -> None:
    monkeypatch.setattr("maetok.networks.layers.attention.plain_is_faster", lambda *_: plain)
    queries, keys, values = torch.randn(3, 2, 4, 9, 8).bfloat16().unbind(0)
    expected = textbook_attention(queries.double(), keys.double(), values.double())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = attention(queries, keys, values)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, atol=2e-2, rtol=0)


def test_width_must_be_divisible_by_heads() -> None:
    with pytest.raises(ValueError, match="width=10 is not divisible by num_heads=3"):
        Attention(10, 3)


def test_rotation_of_a_pair_is_a_rotation_matrix() -> None:
    angle = torch.tensor(0.3)
    pair = torch.tensor([[[2.0, 5.0]]])  # heads 1, token 1, one pair
    rotated = rotate(pair, (angle.cos().view(1, 1, 1), angle.sin().view(1, 1, 1)))
    matrix = torch.tensor([[angle.cos(), -angle.sin()], [angle.sin(), angle.cos()]])
    torch.testing.assert_close(rotated.flatten(), matrix @ torch.tensor([2.0, 5.0]))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-2)])
def test_complex_and_real_products_agree(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tolerance: float) -> None:
    angles = torch.randn(3, 9, 4)
    rotation, tokens = (angles.cos().to(dtype), angles.sin().to(dtype)), torch.randn(2, 5, 3, 9, 8).to(dtype)
    by_complex_product = rotate(tokens, rotation)
    assert by_complex_product.dtype == dtype
    exact = rotate(tokens.double(), (rotation[0].double(), rotation[1].double()))
    torch.testing.assert_close(by_complex_product.double(), exact, atol=tolerance / 2, rtol=0)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(rotate(tokens, rotation), by_complex_product, atol=tolerance, rtol=0)


def test_initial_frequencies_are_a_geometric_series_in_a_random_direction() -> None:
    rope = MixedRotaryEmbedding2d(depth=2, num_heads=3, head_dim=16, theta=10.0)
    along_x, along_y = rope.frequencies.detach().unbind(0)
    magnitude = torch.hypot(along_x, along_y)
    expected = torch.tensor([10.0 ** (-4 * j / 16) for j in range(4)]).repeat(2)
    torch.testing.assert_close(magnitude, expected.expand(2, 3, 8))
    inner_product = along_x[..., :4] * along_x[..., 4:] + along_y[..., :4] * along_y[..., 4:]
    torch.testing.assert_close(inner_product, torch.zeros(2, 3, 4), atol=1e-6, rtol=0)  # second half is perpendicular


def test_angles_use_column_and_row_in_raster_order() -> None:
    rope = MixedRotaryEmbedding2d(1, 1, 4)
    angles = rope.angles((2, 3))  # two rows, three columns
    x, y = rope.frequencies[0, 0, 0], rope.frequencies[1, 0, 0]
    torch.testing.assert_close(angles[0, 0, 5], 2 * x + 1 * y)
    torch.testing.assert_close(angles[0, 0, 1], x)


def test_tokens_outside_the_grid_are_not_rotated() -> None:
    rope = MixedRotaryEmbedding2d(1, 2, 8)
    cos, sin = rope((2, 2), before=1, after=3, dtype=torch.float32)[0]
    assert cos.shape == (2, 8, 4)
    outside = [0, 5, 6, 7]
    assert torch.equal(cos[:, outside], torch.ones(2, 4, 4))
    assert torch.equal(sin[:, outside], torch.zeros(2, 4, 4))


def test_cache_is_used_and_follows_the_frequencies() -> None:
    rope = MixedRotaryEmbedding2d(1, 2, 8)
    with torch.no_grad():
        first = rope((4, 4), 0, 0, torch.float32)
        assert rope((4, 4), 0, 0, torch.float32) is first
        rope.frequencies.mul_(2)
        second = rope((4, 4), 0, 0, torch.float32)
    assert not torch.equal(first[0][0], second[0][0])
    optimizer = torch.optim.AdamW(rope.parameters(), lr=0.1, fused=True)
    rope((4, 4), 0, 0, torch.float32)[0][1].sum().backward()
    optimizer.step()  # does not raise the version of the parameter
    with torch.no_grad():
        assert not torch.equal(rope((4, 4), 0, 0, torch.float32)[0][0], second[0][0])
    assert rope((4, 4), 0, 0, torch.float32)[0][0].requires_grad  # with gradients nothing is cached


def test_weights_made_in_inference_mode_work() -> None:
    with torch.inference_mode():
        rope = MixedRotaryEmbedding2d(1, 2, 8)
        assert rope((4, 4), 0, 0, torch.float32)[0][0].shape == (2, 16, 4)


def test_angles_stay_float32_under_autocast() -> None:
    rope = MixedRotaryEmbedding2d(2, 2, 8)
    expected = rope((16, 16), 0, 0, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert compute_dtype(torch.zeros(1)) == torch.bfloat16
        cos, sin = rope((16, 16), 0, 0, torch.bfloat16)[1]
    # rounding cos to bfloat16 costs at most 2**-9; an angle in bfloat16 would cost up to 0.1
    assert cos.dtype == torch.bfloat16
    assert (cos.float() - expected[1][0]).abs().max() <= 2**-9
    assert (sin.float() - expected[1][1]).abs().max() <= 2**-9


def test_head_dim_must_be_divisible_by_four() -> None:
    with pytest.raises(ValueError, match="width / num_heads divisible by 4, got 6"):
        MixedRotaryEmbedding2d(1, 1, 6)
