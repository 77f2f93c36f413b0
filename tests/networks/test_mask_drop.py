"""Neither dropped patches nor padding reach the latents, and latents of unmasked images do not change."""

import math
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from maetok import Tokenizer
from maetok.losses import masked_prediction_loss
from maetok.networks import MaskedAutoencoder, PlainBottleneck, TransformerSize
from maetok.networks.layers.attention import attention
from maetok.networks.layers.rope import rotate
from maetok.networks.tokenizer.masking import visible_patches
from maetok.networks.tokenizer.published import published_config
from tests.support.blocks import forward_calls

SIZE = TransformerSize(width=32, depth=2, num_heads=2)
CPU = torch.device("cpu")
KINDS = {
    "rotary": {},
    "absolute": {"encoder_positions": "absolute"},
    "both, registers": {"encoder_positions": "both", "register_tokens": 3},
}


def small(**options) -> Tokenizer:
    defaults = {"image_size": 32, "patch_size": 8, "latent_tokens": 4, "encoder": SIZE, "decoder": SIZE}
    defaults |= {"bottleneck": lambda width: PlainBottleneck(width, 6), "mask_mode": "drop"}
    return Tokenizer(**(defaults | options))


def masks(*counts: int, patches: int = 16) -> torch.Tensor:
    """Return one mask for each number of masked patches."""
    ranks = torch.rand(len(counts), patches).argsort(dim=1).argsort(dim=1)
    return ranks < torch.tensor(counts)[:, None]


def by_hand(tokenizer: Tokenizer, image: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the latents of one image (3, H, W) from its visible tokens, with attention written out."""
    encoder = tokenizer.encoder
    whole = encoder.embed(image[None], None)[0]
    before = len(whole) - len(mask) - tokenizer.latent_tokens
    stays = torch.cat(
        (torch.ones(before, dtype=torch.bool), ~mask, torch.ones(tokenizer.latent_tokens, dtype=torch.bool))
    )
    tokens = whole[stays]
    angles = (
        None
        if encoder.rope is None
        else torch.zeros(len(encoder.blocks), SIZE.num_heads, len(whole), SIZE.head_dim // 2)
    )
    if angles is not None:
        angles[:, :, before : before + len(mask)] = encoder.rope.angles(tokenizer.grid)
    for layer, block in enumerate(encoder.blocks):
        qkv = block.attn.qkv(block.norm1(tokens)).unflatten(-1, (3, SIZE.num_heads, -1)).permute(1, 2, 0, 3)
        queries, keys, values = qkv.unbind(0)
        if angles is not None:
            rotation = angles[layer][:, stays].cos(), angles[layer][:, stays].sin()
            queries, keys = rotate(queries.contiguous(), rotation), rotate(keys.contiguous(), rotation)
        weights = (queries @ keys.transpose(-2, -1) / math.sqrt(SIZE.head_dim)).softmax(-1)
        tokens = tokens + block.ls1(block.attn.proj((weights @ values).transpose(0, 1).flatten(1)))
        tokens = tokens + block.ls2(block.mlp(block.norm2(tokens)))
    return tokenizer.bottleneck(encoder.norm(tokens[None, -tokenizer.latent_tokens :]))[0][0]


def test_visible_patches_by_hand() -> None:
    mask = torch.tensor([[True, False, True, False], [False, True, True, True]])
    visible = visible_patches(mask, CPU)
    assert visible.indices.tolist() == [[1, 3], [0, 1]]  # the second image has one: a masked patch follows
    assert visible.present.tolist() == [[True, True], [True, False]]
    same = visible_patches(mask[:1].expand(3, -1), CPU)
    assert same.indices.tolist() == [[1, 3]] * 3
    assert same.present is None  # attention needs no mask
    assert visible_patches(torch.ones(2, 4, dtype=torch.bool), CPU).indices.shape == (2, 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("counts", [(8, 8, 8), (6, 10, 9), (0, 16, 3), (16, 16, 16)])
def test_latents_and_gradients_are_those_of_each_image_alone_without_padding(
    kind: str, counts: tuple[int, ...]
) -> None:
    tokenizer = small(**KINDS[kind])
    images, mask = torch.randn(3, 3, 32, 32), masks(*counts)
    direction = torch.randn(3, 4, 6)

    def gradients(latents: torch.Tensor) -> dict[str, torch.Tensor]:
        tokenizer.zero_grad()
        (latents * direction).sum().backward()
        return {name: p.grad.clone() for name, p in tokenizer.named_parameters() if p.grad is not None}

    latents = tokenizer.encode(images, mask)
    expected = torch.stack([by_hand(tokenizer, image, each) for image, each in zip(images, mask, strict=True)])
    torch.testing.assert_close(latents, expected, atol=1e-5, rtol=0)
    found, wanted = gradients(latents), gradients(expected)
    assert found.keys() == wanted.keys() == {name for name, _ in tokenizer.named_parameters() if "decoder" not in name}
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-4, rtol=1e-4, msg=name)
    alone = torch.cat([tokenizer.encode(images[i : i + 1], mask[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(latents, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_masked_pixels_have_gradient_exactly_zero_and_visible_ones_do_not(kind: str) -> None:
    tokenizer = small(**KINDS[kind])
    images, mask = torch.randn(3, 3, 32, 32, requires_grad=True), masks(5, 11, 8)
    tokenizer.encode(images, mask).square().sum().backward()
    per_patch = images.grad.unfold(2, 8, 8).unfold(3, 8, 8).abs().amax((1, 4, 5)).flatten(1)
    assert (per_patch[mask] == 0).all()
    assert (per_patch[~mask] > 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_without_masked_patches_it_is_the_encoder_that_replaces_bit_for_bit(kind: str) -> None:
    replace, drop = small(**KINDS[kind], mask_mode="replace"), small(**KINDS[kind])
    missing = drop.load_state_dict(replace.state_dict(), strict=False)
    assert (missing.missing_keys, missing.unexpected_keys) == ([], ["encoder.mask_token"])
    images = torch.randn(2, 3, 32, 32)
    latents = replace.encode(images)
    assert torch.equal(drop.encode(images), latents)
    assert torch.equal(drop(images), replace(images))
    assert torch.equal(drop.encode(images, masks(0, 0)), latents)
    assert torch.equal(replace.encode(images, masks(0, 0)), latents)
    assert not torch.allclose(drop.encode(images, masks(8, 8)), latents, atol=1e-2)


def test_nothing_is_read_from_the_accelerator() -> None:
    """Meta tensors have no values to read: lengths come from the mask, which lies on the host."""
    tokenizer = small().to("meta")
    for counts in ((8, 8), (6, 10)):
        assert tokenizer.encode(torch.randn(2, 3, 32, 32, device="meta"), masks(*counts)).shape == (2, 4, 6)
    replacing = small(mask_mode="replace").to("meta")
    assert replacing.encode(torch.randn(2, 3, 32, 32, device="meta"), masks(6, 10)).is_meta
    values = torch.randn(2, 16, 5, device="meta")
    assert masked_prediction_loss(values, values, masks(6, 10), "mse").is_meta


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_without_weight_are_as_good_as_absent(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    plain = dtype == torch.bfloat16  # float32 takes the fused kernel
    monkeypatch.setattr("maetok.networks.layers.attention.plain_is_faster", lambda *_: plain)
    queries, keys, values = torch.randn(3, 2, 4, 9, 8, dtype=torch.float64).to(dtype).unbind(0)
    key_mask = torch.ones(2, 9, dtype=torch.bool)
    key_mask[1, 5:] = False
    result = attention(queries, keys, values, key_mask)
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(result[0], attention(queries, keys, values)[0], atol=tolerance, rtol=0)
    short = attention(queries[1:], keys[1:, :, :5], values[1:, :, :5])
    torch.testing.assert_close(result[1:], short, atol=tolerance, rtol=0)


def forward_flops(tokenizer: Tokenizer, mask: torch.Tensor) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        tokenizer.encoder(torch.randn(len(mask), 3, 64, 64), visible=visible_patches(mask, CPU))
    return counter.get_total_flops()


@pytest.mark.parametrize("counts", [(32, 32), (32, 40)])
def test_operations_are_those_of_the_longest_sequence(monkeypatch: pytest.MonkeyPatch, counts: tuple[int, ...]) -> None:
    """An image costs 24 T W^2 + 4 T^2 W per layer (matrices, attention), T = 1 + visible + L; all patches are embedded.

    In the last layer all T tokens are projected, 6 T W^2, and only the L latent tokens do anything else.
    """
    monkeypatch.setattr(
        "maetok.networks.layers.attention.plain_is_faster", lambda *_: True
    )  # the counter has a formula for this kernel
    tokenizer = small(image_size=64)
    batch, width = len(counts), SIZE.width
    length = 1 + (64 - min(counts)) + 4
    layer = 24 * length * width**2 + 4 * length**2 * width
    embedding = 2 * 64 * (3 * 8 * 8) * width
    last = 6 * length * width**2 + 18 * 4 * width**2 + 4 * length * 4 * width
    expected = batch * ((SIZE.depth - 1) * layer + last + embedding)
    assert forward_flops(tokenizer, masks(*counts, patches=64)) == expected


def test_activation_checkpointing_changes_no_gradient() -> None:
    model = MaskedAutoencoder(small(), {"hog": 27}, depth=1)
    images, mask = torch.randn(2, 3, 32, 32), masks(5, 9)
    gradients, calls = [], forward_calls(model)
    for enabled, expected in ((False, 1), (True, 3)):  # checkpointing adds calls in forward and backward
        model.zero_grad()
        model.set_activation_checkpointing(enabled)
        output = model(images, mask)
        (output.reconstructions.square().mean() + output.predictions["hog"].square().mean()).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})  # every parameter has one
        assert calls == [expected] * len(model.blocks())
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_encoder_compiles_without_graph_breaks_and_blocks_for_all_lengths_at_once() -> None:
    tokenizer = small()
    images, mask = torch.randn(3, 3, 32, 32), masks(5, 9, 8)
    encoder = torch.compile(tokenizer.encoder, backend="aot_eager", fullgraph=True)
    compiled = tokenizer.bottleneck(encoder(images, visible=visible_patches(mask, CPU)))[0]
    torch.testing.assert_close(compiled, tokenizer.encode(images, mask), atol=1e-5, rtol=0)
    torch.compiler.reset()
    graphs = []

    def count(graph: torch.fx.GraphModule, _: list) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    model = MaskedAutoencoder(small(), {}, depth=1)
    for block in (*model.tokenizer.encoder.blocks, *model.tokenizer.decoder.blocks):
        block.compile(backend=count)
    for step in range(12):
        model(images, masks(step, 12 - step, 8)).reconstructions.mean().backward()
        if step == 3:
            settled = len(graphs)
    assert len(graphs) == settled < torch._dynamo.config.recompile_limit  # at the limit dynamo would stop compiling


def test_it_is_published_as_a_tokenizer_without_mask_token(tmp_path: Path) -> None:
    """The published format says so by ``enc_token_drop: 0``; masks drop patches in a tokenizer read from it."""
    replacing, dropping = small(mask_mode="replace"), small()
    with_token, without = published_config(replacing), published_config(dropping)
    assert (with_token.pop("enc_token_drop"), without.pop("enc_token_drop")) == (0.4, 0.0)
    assert with_token == without
    dropping.save_pretrained(tmp_path)
    read = Tokenizer.from_pretrained(tmp_path)
    images, mask = torch.randn(2, 3, 32, 32), masks(5, 9)
    for given in (None, mask):
        torch.testing.assert_close(read.encode(images, given), dropping.encode(images, given), atol=1e-6, rtol=0)
