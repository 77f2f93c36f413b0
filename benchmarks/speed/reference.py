"""Each hot path written plainly, as a textbook and most published code have it, on the weights of our networks.

Softmax attention by three operations; rotary angles made complex in each block and applied to image tokens only, in
float32 with the casts around; every layer computes every token; guided sampling with doubled batches. The functions
take our modules, so they differ in nothing but the way they compute (``tests/benchmarks/test_reference.py``).
"""

import itertools
import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from maetok import SiT, Tokenizer
from maetok.networks.denoiser.transformer import ConditionedBlock, modulate
from maetok.networks.layers.attention import Attention
from maetok.networks.layers.patches import grid_of, unpatchify
from maetok.networks.layers.vit import Block, ModulatedBlock, modulate_latent_tokens
from maetok.networks.tokenizer.masked_autoencoder import MaskedAutoencoder


def attention(
    module: Attention, tokens: Tensor, angles: Tensor | None = None, image_tokens: slice | None = None
) -> Tensor:
    """Attend: (B, T, width) -> (B, T, width); ``angles`` (heads, N, head_dim / 2) rotate image queries and keys."""
    batch, length, width = tokens.shape
    qkv = module.qkv(tokens).reshape(batch, length, 3, module.num_heads, width // module.num_heads)
    queries, keys, values = qkv.permute(2, 0, 3, 1, 4)
    if angles is not None and image_tokens is not None:
        queries, keys = rotated(queries, angles, image_tokens), rotated(keys, angles, image_tokens)
    scores = (queries * queries.shape[-1] ** -0.5) @ keys.transpose(-2, -1)
    attention_output = scores.softmax(dim=-1) @ values
    return module.proj(attention_output.transpose(1, 2).reshape(batch, length, width))


def rotated(queries_or_keys: Tensor, angles: Tensor, image_tokens: slice) -> Tensor:
    """Rotate image tokens of (B, heads, T, head_dim) as complex numbers in float32."""
    image = queries_or_keys[:, :, image_tokens].float()
    pairs = torch.view_as_complex(image.reshape(*image.shape[:-1], -1, 2).contiguous())
    image = torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(3)
    result = queries_or_keys.clone()
    result[:, :, image_tokens] = image.to(queries_or_keys.dtype)
    return result


def transformer(
    blocks: Iterable[nn.Module], tokens: Tensor, part: nn.Module, grid: tuple[int, int], before: int, latents: Tensor
) -> Tensor:
    """Run the blocks of an encoder or decoder on all tokens (B, T, width)."""
    image_tokens = slice(before, before + math.prod(grid))
    all_angles = part.rope.angles(grid) if part.rope is not None else None  # type: ignore[union-attr, operator]
    for layer, block in enumerate(blocks):
        angles = None if all_angles is None else all_angles[layer]
        if isinstance(block, Block):
            tokens = tokens + block.ls1(attention(block.attn, block.norm1(tokens), angles, image_tokens))
            tokens = tokens + block.ls2(block.mlp(block.norm2(tokens)))
        elif isinstance(block, ModulatedBlock):
            shift1, scale1, shift2, scale2 = block.modulation(F.silu(latents)).chunk(4, dim=-1)
            normed = modulate_latent_tokens(block.norm1(tokens), shift1, scale1)
            tokens = tokens + attention(block.attn, normed, angles, image_tokens)
            tokens = tokens + block.mlp(modulate_latent_tokens(block.norm2(tokens), shift2, scale2))
    return tokens


def encode(tokenizer: Tokenizer, images: Tensor, mask: Tensor | None = None) -> Tensor:
    """Encode images (B, 3, H, W) with mask (B, N) bool -> raw latents (B, L, C)."""
    encoder, grid = tokenizer.encoder, grid_of(images, tokenizer.patch_size)
    tokens = encoder.embed(images, mask)
    before = tokens.shape[1] - math.prod(grid) - tokenizer.latent_tokens
    tokens = transformer(encoder.blocks, tokens, encoder, grid, before, tokens)
    return tokenizer.bottleneck(encoder.norm(tokens)[:, -tokenizer.latent_tokens :])[0]


def decode(tokenizer: Tokenizer, latents: Tensor) -> Tensor:
    """Decode raw latents (B, L, C) -> images (B, 3, H, W)."""
    decoder, grid = tokenizer.decoder, tokenizer.grid
    tokens, before = decoder.embed(latents, grid), int(decoder.class_token is not None)
    tokens = transformer(decoder.blocks, tokens, decoder, grid, before, latents)
    return unpatchify(decoder.output(decoder.norm(tokens)[:, before : before + math.prod(grid)]), grid)


def autoencode(model: MaskedAutoencoder, images: Tensor, mask: Tensor | None) -> Tensor:
    """Return reconstructions (B, 3, H, W) of masked images."""
    return decode(model.tokenizer, encode(model.tokenizer, images, mask))


def velocity(model: SiT, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """Return SiT's velocity (B, L, C)."""
    condition = F.silu(model.time_embedder(t) + model.label_embedder(labels))
    tokens = model.embed(x)
    for block in model.blocks:
        assert isinstance(block, ConditionedBlock)
        shift1, scale1, gate1, shift2, scale2, gate2 = block.modulation(condition).chunk(6, dim=-1)
        tokens = tokens + gate1.unsqueeze(1) * attention(block.attn, modulate(block.norm1(tokens), shift1, scale1))
        tokens = tokens + gate2.unsqueeze(1) * block.mlp(modulate(block.norm2(tokens), shift2, scale2))
    return model.final_layer(tokens, condition).to(x.dtype)


@torch.no_grad()
def sample(
    model: SiT, labels: Tensor, noise: Tensor, steps: int, scale: float, interval: tuple[float, float]
) -> Tensor:
    """Run Euler steps from noise to data that keep unconditional samples: 4n rows with guidance, 2n without.

    State [n | n null] in float64. With guidance it is doubled once more inside the model call, as by the published
    script; the second half of the state is thrown away at the end.
    """
    null = torch.full_like(labels, model.num_classes)
    state, labels = torch.cat((noise, noise)).double(), torch.cat((labels, null))
    times = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64).tolist()
    for t, following in itertools.pairwise(times):
        if scale > 1.0 and interval[0] <= t <= interval[1]:
            doubled, both = (
                torch.cat((state, state)).float(),
                torch.cat((labels, torch.full_like(labels, model.num_classes))),
            )
            towards, away = velocity(model, doubled, torch.full((len(doubled),), t), both).double().chunk(2)
            change = away + scale * (towards - away)
        else:
            change = velocity(model, state.float(), torch.full((len(state),), t), labels).double()
        state = state + (following - t) * change
    return state.chunk(2)[0].to(noise.dtype)


def update(network: nn.Module, optimizer: Optimizer, average: nn.Module, decay: float) -> None:
    """Clip gradients, step the optimizer, move the average towards the network, parameter by parameter."""
    nn.utils.clip_grad_norm_(network.parameters(), 1.0, foreach=False)
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        for mean, value in zip(average.parameters(), network.parameters(), strict=True):
            mean.mul_(decay).add_(value, alpha=1 - decay)
