"""What transformers share: sizes, blocks, position tables and initialisation."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from timm.layers import LayerScale, Mlp
from torch import Tensor, nn

from maetok.networks.layers.attention import Attention
from maetok.networks.layers.network import Network
from maetok.networks.layers.rope import MixedRotaryEmbedding2d, Rotation, autocasts

Positions = Literal["rotary", "absolute", "both"]
"""Positions of image tokens: rotary angles in attention, a learned table that is added to the input, or both."""


@dataclass(frozen=True)
class TransformerSize:
    """Size of a vision transformer; ``configs/size`` has the usual ones (tiny, small, base, large)."""

    width: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0

    @property
    def head_dim(self) -> int:
        """Channels per attention head."""
        return self.width // self.num_heads


class LayerNorm(nn.LayerNorm):
    """Layer normalisation in the dtype of its input, even if sharded parameters are gathered in bfloat16."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., width) -> (..., width)."""
        weight, bias = (None if given is None else given.to(input.dtype) for given in (self.weight, self.bias))
        return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)


class Block(nn.Module):
    """Pre-norm transformer block: attention and MLP with residual connections scaled per channel (LayerScale).

    Args:
        size: width, heads and MLP ratio.
        layer_scale: initial value of the residual scales. The released weights started at 1e-5, which makes a decoder
            ignore its input, so our default is 1.
    """

    def __init__(self, size: TransformerSize, layer_scale: float = 1.0) -> None:
        super().__init__()
        self.norm1 = LayerNorm(size.width, eps=1e-6)
        self.attn = Attention(size.width, size.num_heads)
        self.ls1 = LayerScale(size.width, init_values=layer_scale)
        self.norm2 = LayerNorm(size.width, eps=1e-6)
        self.mlp = Mlp(size.width, int(size.width * size.mlp_ratio))
        self.ls2 = LayerScale(size.width, init_values=layer_scale)

    def forward(
        self,
        tokens: Tensor,
        rotation: Rotation | None,
        latents: Tensor | None = None,
        key_mask: Tensor | None = None,
        outputs: slice | None = None,
    ) -> Tensor:
        """Transform tokens: (B, T, width) -> (B, T, width), or (B, S, width), the S tokens of ``outputs``.

        ``key_mask`` (B, T) bool is False for tokens that no token may read. Only :class:`ModulatedBlock` uses
        ``latents``.
        """
        update = self.ls1(self.attn(self.norm1(tokens), rotation, key_mask, outputs))
        tokens = (tokens if outputs is None else tokens[:, outputs]) + update
        return tokens + self.ls2(self.mlp(self.norm2(tokens)))

    def initialize(self, depth: int) -> None:
        """Scale the residual branches for a transformer of ``depth`` blocks; see :func:`initialize`."""
        scale_residual_branches(self.attn, self.mlp, depth)


class ModulatedBlock(nn.Module):
    """Block of the released "movqv2" decoder: the latents shift and scale the normalised *latent tokens*.

    The last L tokens of the sequence are latent tokens. After each normalisation, token i among them becomes
    ``h * scale(z_i) + shift(z_i)``, where z is the raw latent. There is no LayerScale.

    Args:
        size: width, heads and MLP ratio.
        latent_channels: channels C of a raw latent.
    """

    def __init__(self, size: TransformerSize, latent_channels: int) -> None:
        super().__init__()
        self.norm1 = LayerNorm(size.width, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(size.width, size.num_heads)
        self.norm2 = LayerNorm(size.width, eps=1e-6, elementwise_affine=False)
        self.mlp = Mlp(size.width, int(size.width * size.mlp_ratio))
        self.modulation = nn.Linear(latent_channels, 4 * size.width)

    def forward(
        self, tokens: Tensor, rotation: Rotation | None, latents: Tensor, outputs: slice | None = None
    ) -> Tensor:
        """Transform tokens (B, T, width) with latents (B, L, C).

        Returns:
            (B, T, width), or (B, S, width), the S image tokens of ``outputs``.
        """
        shift1, scale1, shift2, scale2 = self.modulation(F.silu(latents)).chunk(4, dim=-1)
        attention_output = self.attn(
            modulate_latent_tokens(self.norm1(tokens), shift1, scale1), rotation, outputs=outputs
        )
        if outputs is not None:
            tokens = tokens[:, outputs] + attention_output
            return tokens + self.mlp(self.norm2(tokens))
        tokens = tokens + attention_output
        return tokens + self.mlp(modulate_latent_tokens(self.norm2(tokens), shift2, scale2))

    def initialize(self, depth: int) -> None:
        """Start as an ordinary block (scale 1, shift 0) whose modulation already depends on the latents a little."""
        scale_residual_branches(self.attn, self.mlp, depth)
        nn.init.normal_(self.modulation.weight, std=0.02)
        nn.init.zeros_(self.modulation.bias)
        with torch.no_grad():
            for scale in self.modulation.bias.chunk(4)[1::2]:
                scale.fill_(1.0)


def modulate_latent_tokens(tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Apply ``h * scale + shift`` to the last L of the tokens (B, T, width); shift and scale are (B, L, width)."""
    image_tokens, latent_tokens = tokens.split([tokens.shape[1] - shift.shape[1], shift.shape[1]], dim=1)
    return torch.cat((image_tokens, latent_tokens * scale + shift), dim=1)


def scale_residual_branches(attention: Attention, mlp: Mlp, depth: int) -> None:
    """Multiply the last weights of both residual branches by (2 * depth) ** -0.5."""
    with torch.no_grad():
        for output in (attention.proj, mlp.fc2):
            output.weight.mul_((2 * depth) ** -0.5)


def run_blocks(
    blocks: Sequence[nn.Module],
    tokens: Tensor,
    rotations: list[Rotation] | None,
    *arguments: Tensor | None,
    outputs: slice | None = None,
) -> Tensor:
    """Run transformer blocks one after another.

    Args:
        blocks: called with the tokens, the rotation of their layer and ``arguments``.
        tokens: (B, T, width).
        rotations: one per block.
        *arguments: further arguments of every block.
        outputs: the only tokens that the last block computes and that are returned; all if not given.

    Returns:
        (B, T, width), or (B, S, width), the S tokens of ``outputs``; float32 under autocast.
    """
    if autocasts(tokens):
        tokens = tokens.float()  # sums of residual branches stay float32, even if sharded parameters are bfloat16
    last = len(blocks) - 1
    for layer, block in enumerate(blocks):
        rotation = None if rotations is None else rotations[layer]
        only = {"outputs": outputs} if outputs is not None and layer == last else {}
        tokens = block(tokens, rotation, *arguments, **only)
    return tokens


def position_table(prefix_slots: int, grid: tuple[int, int], width: int) -> nn.Parameter:
    """Make a learned table (1, prefix_slots + N, width) with small initial values."""
    return nn.Parameter(torch.randn(1, prefix_slots + math.prod(grid), width) * 0.02)


def resize_position_table(table: Tensor, grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Resize a table (1, P + N, width) to another grid by bicubic interpolation; the P prefix slots do not change."""
    if grid == new_grid:
        return table
    prefix, image = table.split([table.shape[1] - math.prod(grid), math.prod(grid)], dim=1)
    image = image.unflatten(1, grid).permute(0, 3, 1, 2).float()
    image = F.interpolate(image, size=new_grid, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat((prefix, image.flatten(2).transpose(1, 2).to(table.dtype)), dim=1)


def rotary_embedding(positions: Positions, size: TransformerSize, theta: float) -> MixedRotaryEmbedding2d | None:
    """Make the rotary embedding, unless ``positions`` is absolute."""
    if positions == "absolute":
        return None
    return MixedRotaryEmbedding2d(size.depth, size.num_heads, size.head_dim, theta)


def initialize(network: Network) -> None:
    """Initialise linear and convolution layers by fan-in, and scale residual branches by depth, so signals keep size.

    With this start, attention already tells positions apart and the reconstruction depends on the latents in the very
    first step. Neither holds for the released initialisation (zero modulation, LayerScale 1e-5).
    """
    for child in network.modules():
        if isinstance(child, nn.Linear | nn.Conv2d):
            nn.init.trunc_normal_(child.weight, std=child.weight[0].numel() ** -0.5)
            if child.bias is not None:
                nn.init.zeros_(child.bias)
    blocks = network.blocks()
    for block in blocks:
        block.initialize(len(blocks))  # type: ignore[operator]
