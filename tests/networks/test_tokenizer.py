"""The tokenizer at several sizes: first training step, number of parameters, compilation and bfloat16."""

import copy

import pytest
import torch

from maetok import Tokenizer
from maetok.networks import KLBottleneck, LatentTokenizer, MaskedAutoencoder, PlainBottleneck, TransformerSize
from maetok.networks.layers.patches import patch_grid, unpatchify
from maetok.networks.layers.vit import resize_position_table
from tests.support.blocks import compiled_graphs, forward_calls

SIZE = TransformerSize(width=32, depth=2, num_heads=2)


def small(**options) -> Tokenizer:
    defaults = {"image_size": 32, "patch_size": 8, "latent_tokens": 4, "encoder": SIZE, "decoder": SIZE}
    return Tokenizer(**(defaults | {"bottleneck": lambda width: PlainBottleneck(width, 6)} | options))


@pytest.mark.parametrize("positions", ["rotary", "absolute", "both"])
@pytest.mark.parametrize("size", [(32, 32), (16, 40), (64, 8)])
def test_any_size_that_is_divisible_by_the_patch_size(positions: str, size: tuple[int, int]) -> None:
    tokenizer = small(encoder_positions=positions, decoder_positions=positions)
    images = torch.randn(2, 3, *size)
    latents = tokenizer.encode(images)
    assert latents.shape == (2, 4, 6)
    assert tokenizer.decode(latents, size).shape == images.shape
    assert tokenizer(images).shape == images.shape


def test_decode_defaults_to_the_training_resolution() -> None:
    tokenizer = small(image_size=(16, 40))
    assert tokenizer.decode(torch.randn(1, 4, 6)).shape == (1, 3, 16, 40)


def test_sizes_that_do_not_fit_are_refused() -> None:
    tokenizer = small()
    with pytest.raises(ValueError, match="image size 30x32 is not divisible by patch_size=8"):
        tokenizer.encode(torch.randn(1, 3, 30, 32))
    with pytest.raises(ValueError, match=r"mask has shape \(1, 9\), expected \(1, 16\)"):
        tokenizer.encode(torch.randn(1, 3, 32, 32), torch.zeros(1, 9, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"latents have shape \(1, 5, 6\), expected \(B, 4, 6\)"):
        tokenizer.decode(torch.randn(1, 5, 6))
    with pytest.raises(ValueError, match="mask_mode='remove' must be replace or drop"):
        small(mask_mode="remove")
    with pytest.raises(ValueError, match="image size 33x33"):
        small(image_size=33)


def test_patch_layout_is_row_column_channel() -> None:
    patches = torch.arange(2 * 12, dtype=torch.float32).view(1, 2, 12)  # two patches of 2 x 2 x 3 values
    image = unpatchify(patches, (1, 2))
    assert image.shape == (1, 3, 2, 4)
    assert image[0, 1, 0, 0] == 1  # first patch, row 0, column 0, channel 1
    assert image[0, 0, 1, 3] == 12 + 9  # second patch, row 1, column 1, channel 0
    assert patch_grid((16, 24), 8) == (2, 3)


def test_fully_masked_images_look_alike_and_unmasked_patches_matter() -> None:
    tokenizer = small().eval()
    images = torch.randn(2, 3, 32, 32)
    everything = torch.ones(2, 16, dtype=torch.bool)
    latents = tokenizer.encode(images, everything)
    torch.testing.assert_close(latents[0], latents[1])
    half = everything.clone()
    half[:, 8:] = False
    changed = images.clone()
    changed[:, :, :16] += 1.0  # the masked upper half
    torch.testing.assert_close(tokenizer.encode(images, half), tokenizer.encode(changed, half))
    assert not torch.allclose(tokenizer.encode(images), tokenizer.encode(changed))


@pytest.mark.parametrize("modulation", [False, True])
def test_first_step_depends_on_latents_and_reaches_the_encoder(modulation: bool) -> None:
    """The published initialisation fails this: its encoder gets gradient 0 (modulated) or 5e-7 (plain)."""
    tokenizer = small(latent_modulation=modulation)
    images = torch.rand(4, 3, 32, 32) * 2 - 1
    first, second = torch.randn(2, 1, 4, 6)
    change = (tokenizer.decode(first) - tokenizer.decode(second)).square().mean().sqrt()
    assert change > 0.05
    reconstruction = tokenizer.decode(first)
    patches = reconstruction.unfold(2, 8, 8).unfold(3, 8, 8).permute(2, 3, 0, 1, 4, 5).flatten(0, 1)
    assert patches.std(0).mean() > 0.01  # positions differ from each other too
    (tokenizer(images) - images).square().mean().backward()
    norm = torch.stack([p.grad.norm() for p in tokenizer.encoder.blocks.parameters()]).norm()
    assert norm > 1e-2
    unused = [name for name, p in tokenizer.named_parameters() if p.grad is None]
    assert unused == ["encoder.mask_token"]  # no mask in this step


def test_a_tokenizer_keeps_the_contract() -> None:
    """Stage 2 trains the decoder alone, and the last layer makes the pixels."""
    tokenizer = small()
    assert isinstance(tokenizer, LatentTokenizer)
    assert tokenizer.latent_grid is None
    assert tokenizer.latent_statistics is None
    tokenizer.published_config = {"vq_mean": 0.5, "vq_std": 2.0}
    mean, scale = tokenizer.latent_statistics
    assert (mean.tolist(), scale.tolist()) == ([0.5] * 6, [2.0] * 6)
    everything = {id(parameter): name for name, parameter in tokenizer.named_parameters()}
    trained = {everything[id(parameter)] for parameter in tokenizer.trainable_parameters(stage=2)}
    assert trained == {name for name in everything.values() if name.startswith("decoder.")}
    assert len(tokenizer.trainable_parameters(stage=1)) == len(everything)
    latents = torch.randn(2, 4, 6)
    with torch.no_grad():
        tokenizer.decoder.output.bias.zero_()
        tokenizer.last_layer.zero_()
    assert tokenizer.decode(latents).abs().max() == 0


def test_default_is_maetok_b_128_with_176_million_parameters() -> None:
    with torch.device("meta"):
        tokenizer = Tokenizer()
    parameters = sum(parameter.numel() for parameter in tokenizer.parameters())
    assert abs(parameters / 176e6 - 1) < 0.03
    assert (tokenizer.latent_tokens, tokenizer.latent_channels, tokenizer.grid) == (128, 32, (16, 16))


def test_rectangular_table_resize_keeps_prefix_and_constant_tables() -> None:
    table = torch.cat((torch.full((1, 1, 3), 7.0), torch.full((1, 16, 3), 2.0)), dim=1)
    resized = resize_position_table(table, (4, 4), (2, 6))
    assert resized.shape == (1, 13, 3)
    torch.testing.assert_close(resized[:, :1], table[:, :1])
    torch.testing.assert_close(resized[:, 1:], torch.full((1, 12, 3), 2.0))
    assert resize_position_table(table, (4, 4), (4, 4)) is table


@pytest.mark.parametrize(("positions", "modulation"), [("rotary", False), ("both", True)])
def test_encoder_and_decoder_compile_without_graph_breaks(positions: str, modulation: bool) -> None:
    tokenizer = small(encoder_positions=positions, decoder_positions=positions, latent_modulation=modulation)
    images, mask = torch.randn(2, 3, 32, 32), torch.rand(2, 16) < 0.5
    encoder = torch.compile(tokenizer.encoder, backend="aot_eager", fullgraph=True)
    decoder = torch.compile(tokenizer.decoder, backend="aot_eager", fullgraph=True)
    latents = tokenizer.bottleneck(encoder(images, mask))[0]
    torch.testing.assert_close(latents, tokenizer.encode(images, mask), atol=1e-5, rtol=0)
    torch.testing.assert_close(decoder(latents, (4, 4)), tokenizer.decoder(latents, (4, 4)), atol=1e-5, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert decoder(latents, (4, 4)).dtype == torch.bfloat16


def test_activation_checkpointing_changes_no_gradient() -> None:
    model = MaskedAutoencoder(small(), {"hog": 27}, depth=1)
    images = torch.randn(2, 3, 32, 32)
    calls = forward_calls(model)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        output = model(images)
        (output.reconstructions.square().mean() + output.predictions["hog"].square().mean()).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    assert calls == [1] * len(model.blocks())
    model.set_activation_checkpointing(True)
    recomputed = gradients()
    assert calls == [3] * len(model.blocks())  # one more call in the forward pass and one in the backward pass
    with torch.no_grad():
        model(images)
    assert calls == [4] * len(model.blocks())
    assert plain.keys() == recomputed.keys()
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


@pytest.mark.slow
def test_compiled_blocks_compute_the_same() -> None:
    """The real compiler runs forward and backward, with activation checkpointing."""
    images = torch.randn(2, 3, 32, 32)
    gradients = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = MaskedAutoencoder(small(latent_modulation=True), {"hog": 27}, depth=1)
        if compiled:
            torch._dynamo.utils.counters.clear()
            model.set_activation_checkpointing(True)
            model.compile_blocks()
        model(images).reconstructions.square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    # First and last block of encoder and of the modulated decoder; the auxiliary decoder has a last block only.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 5
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-4)


def test_compiled_blocks_keep_state_dict_names(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = compiled_graphs(monkeypatch)
    model, images = MaskedAutoencoder(small(), {"hog": 27}, depth=1), torch.randn(2, 3, 32, 32)
    names, expected = list(model.state_dict()), model(images).reconstructions
    model.compile_blocks()
    assert list(model.state_dict()) == names
    torch.testing.assert_close(model(images).reconstructions, expected, atol=1e-5, rtol=1e-4)
    assert len(graphs) == 4  # first and last block of encoder and decoder; the auxiliary block shares the last one


def test_bfloat16_autocast_is_close_to_float32() -> None:
    tokenizer = small(encoder_positions="both", decoder_positions="both").eval()
    images = torch.rand(4, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        exact = tokenizer(images)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = tokenizer(images).float()
    assert (rounded - exact).square().mean().sqrt() / exact.square().mean().sqrt() < 0.03


def test_auxiliary_decoders_share_latents_and_have_their_own_depth() -> None:
    model = MaskedAutoencoder(small(), {"hog": 27, "teacher": 10}, depth=3)
    output = model(torch.randn(2, 3, 32, 32))
    assert {name: tuple(value.shape) for name, value in output.predictions.items()} == {
        "hog": (2, 16, 27),
        "teacher": (2, 16, 10),
    }
    assert len(model.auxiliary_decoders["hog"].blocks) == 3
    output.predictions["teacher"].sum().backward()
    assert model.tokenizer.encoder.latent_tokens.grad is not None
    assert model.tokenizer.decoder.mask_token.grad is None


def test_linear_auxiliary_decoder_is_linear_and_tied_to_its_grid() -> None:
    decoder = MaskedAutoencoder(small(), {"hog": 27}, depth="linear").auxiliary_decoders["hog"]
    a, b, zero = torch.randn(1, 4, 6), torch.randn(1, 4, 6), torch.zeros(1, 4, 6)
    superposition = decoder(a) + decoder(b) - decoder(zero)
    torch.testing.assert_close(decoder(a + b), superposition, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="tied to its grid"):
        decoder(a, (2, 2))


def test_bottleneck_losses_come_through_and_tokenizers_can_be_copied_after_training() -> None:
    model = MaskedAutoencoder(small(bottleneck=lambda width: KLBottleneck(width, 6, weight=1.0)), {})
    output = model(torch.randn(2, 3, 32, 32))
    assert output.losses["kl"] > 0
    copy.deepcopy(model)


@pytest.mark.parametrize("modulation", [False, True])
def test_sums_of_residual_branches_are_float32_also_where_sharded_parameters_are_bfloat16(modulation: bool) -> None:
    tokenizer = Tokenizer(32, 8, 4, encoder=SIZE, decoder=SIZE, latent_modulation=modulation).bfloat16()
    seen = []
    for blocks in (tokenizer.encoder.blocks, tokenizer.decoder.blocks):
        for block in blocks:
            block.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        tokenizer(torch.rand(1, 3, 32, 32))
    assert seen == [torch.float32] * 2 * SIZE.depth
