"""The transformer that SiT and LightningDiT are built on, and its parts (DiT, arXiv 2212.09748)."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maetok.networks.denoiser.denoiser import Condition, Denoiser
from maetok.networks.layers.attention import Attention
from maetok.networks.layers.network import Blocks
from maetok.networks.layers.rope import Rotation
from maetok.networks.layers.vit import TransformerSize, run_blocks

SIZES = {
    "S": TransformerSize(384, 12, 6),
    "B": TransformerSize(768, 12, 12),
    "L": TransformerSize(1024, 24, 16),
    "XL": TransformerSize(1152, 28, 16),
}
"""The sizes S to XL of SiT and LightningDiT (DiT, table 1)."""


def modulate(tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return ``h * (1 + scale) + shift`` for tokens (B, T, width) with shift and scale (B, width) each."""
    return tokens * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class TimeEmbedder(nn.Module):
    """Embed times with 128 cosines and 128 sines of geometrically spaced frequencies, and a two-layer MLP.

    t in [0, 1] is *not* multiplied by 1000: the released weights were trained without that factor.

    Args:
        width: size of the embedding.
    """

    FREQUENCIES, BASE = 128, 10000.0

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * self.FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """Embed t (B,) float in [0, 1] as (B, width). Angles are float32, under autocast too."""
        exponents = torch.arange(self.FREQUENCIES, device=t.device, dtype=torch.float32) / self.FREQUENCIES
        angles = t.float()[:, None] * torch.exp(-math.log(self.BASE) * exponents)
        return self.mlp(torch.cat((angles.cos(), angles.sin()), dim=-1).to(next(self.mlp.parameters()).dtype))


class NormalizedProjection(nn.Linear):
    """The fused projection of an attention layer, with queries and keys normalised per head (qk-norm).

    Args:
        width: token width.
        num_heads: attention heads.
        norm: builds the normalisation of head_dim channels.
    """

    def __init__(self, width: int, num_heads: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__(width, 3 * width)
        self.num_heads = num_heads
        self.query_norm, self.key_norm = norm(width // num_heads), norm(width // num_heads)

    def forward(self, input: Tensor) -> Tensor:
        """Project (B, T, width) to (B, T, 3 * width), laid out as [queries | keys | values], each by heads.

        Under autocast the normalisation is computed in float32.
        """
        projected = super().forward(input)
        queries, keys, values = projected.unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        precise = next(self.query_norm.parameters()).dtype
        queries, keys = self.query_norm(queries.to(precise)), self.key_norm(keys.to(precise))
        return torch.stack((queries.to(values.dtype), keys.to(values.dtype), values), dim=-3).flatten(-3)


class ConditionedBlock(nn.Module):
    """Transformer block whose condition shifts, scales and gates attention and MLP ("adaLN-zero", DiT section 3.2).

    All gates start at zero, so a new block returns its input.

    Args:
        size: width and heads.
        norm: builds a normalisation of ``width`` channels.
        mlp: the block's MLP, (B, T, width) -> (B, T, width).
        query_key_norm: builds the normalisation of the queries and keys of one head; none by default.
    """

    def __init__(
        self,
        size: TransformerSize,
        norm: Callable[[int], nn.Module],
        mlp: nn.Module,
        query_key_norm: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = norm(size.width)
        self.attn = Attention(size.width, size.num_heads)
        if query_key_norm is not None:
            self.attn.qkv = NormalizedProjection(size.width, size.num_heads, query_key_norm)
        self.norm2 = norm(size.width)
        self.mlp = mlp
        self.modulation = nn.Linear(size.width, 6 * size.width)

    def forward(self, tokens: Tensor, rotation: Rotation | None, condition: Tensor) -> Tensor:
        """Transform (B, T, width) with the embedded condition (B, width), after its nonlinearity, to (B, T, width)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).chunk(6, dim=-1)
        tokens = tokens + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(tokens), shift1, scale1), rotation)
        return tokens + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(tokens), shift2, scale2))


class FinalLayer(nn.Module):
    """Normalisation modulated by the condition, then a linear map. Both start at zero, so the first velocity is zero.

    Args:
        width: token width.
        channels: channels C of a latent.
        norm: builds a normalisation of ``width`` channels.
    """

    def __init__(self, width: int, channels: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.norm = norm(width)
        self.modulation = nn.Linear(width, 2 * width)
        self.linear = nn.Linear(width, channels)

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        """Map (B, L, width) with the embedded condition (B, width), after its nonlinearity, to (B, L, C)."""
        shift, scale = self.modulation(condition).chunk(2, dim=-1)
        return self.linear(modulate(self.norm(tokens), shift, scale))


class DiffusionTransformer(Denoiser):
    """A transformer over latent tokens (patch size 1), conditioned on time and class through adaLN-zero.

    SiT and LightningDiT pass their normalisation and MLP, and override :meth:`embed` or :meth:`rotations` to add
    positions.

    Args:
        latent_tokens: number L of latent tokens.
        latent_channels: channels C of each.
        num_classes: number of classes, which is also the null label; None or 0 for a denoiser without labels.
        size: width, depth, heads and MLP ratio.
        norm: builds a normalisation of a given number of channels.
        mlp: builds the MLP of a block.
        query_key_norm: builds the normalisation of the queries and keys of one head; none by default.

    Raises:
        ValueError: if the width is not divisible by the number of heads.
    """

    def __init__(
        self,
        latent_tokens: int,
        latent_channels: int,
        num_classes: int | None,
        size: TransformerSize,
        norm: Callable[[int], nn.Module],
        mlp: Callable[[TransformerSize], nn.Module],
        query_key_norm: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__(latent_tokens, latent_channels, num_classes)
        self.size = size
        self.input = nn.Linear(latent_channels, size.width)
        self.time_embedder = TimeEmbedder(size.width)
        self.label_embedder = nn.Embedding(self.num_classes + 1, size.width) if self.num_classes else None
        self.blocks = Blocks(ConditionedBlock(size, norm, mlp(size), query_key_norm) for _ in range(size.depth))
        self.final_layer = FinalLayer(size.width, latent_channels, norm)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as DiT: Xavier for linear layers, 0.02 for embeddings, zero for modulation and output."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for name, parameter in self.named_parameters():
            if "_embedder." in name and name.endswith(".weight"):
                nn.init.normal_(parameter, std=0.02)
            elif ".modulation." in name or name.startswith("final_layer.linear."):
                nn.init.zeros_(parameter)

    def embed(self, x: Tensor) -> Tensor:
        """Return the tokens (B, L, width) that enter the first block.

        They have the dtype of ``x``, under autocast too, and so have all sums of residual branches.
        """
        return self.input(x).to(x.dtype)

    def rotations(self, tokens: Tensor) -> list[Rotation] | None:
        """Return the rotations of queries and keys in each block for tokens (B, L, width); none by default."""
        return None

    def embed_condition(self, t: Tensor, condition: Condition) -> Tensor:
        """Embed times (B,) and, with classes, labels (B,) for all blocks: (B, width), after the nonlinearity.

        Raises:
            ValueError: if labels are missing, or are not (B,) integers.
        """
        embedded = self.time_embedder(t)
        if self.label_embedder is not None:
            if not isinstance(condition, Tensor) or condition.shape != t.shape or condition.is_floating_point():
                got = f"{tuple(condition.shape)} {condition.dtype}" if isinstance(condition, Tensor) else condition
                raise ValueError(f"labels must be {tuple(t.shape)} integers, one for each of the latents; got {got}")
            embedded = embedded + self.label_embedder(condition)
        return F.silu(embedded)

    def forward(self, x: Tensor, t: Tensor, condition: Condition = None) -> Tensor:
        """Predict the velocity (B, L, C); see :meth:`Denoiser.forward`."""
        if x.shape[1:] != (self.latent_tokens, self.latent_channels):
            expected = f"(B, {self.latent_tokens}, {self.latent_channels})"
            raise ValueError(f"latents have shape {tuple(x.shape)}, expected {expected}")
        if t.shape != x.shape[:1]:
            raise ValueError(f"t has shape {tuple(t.shape)}, expected ({len(x)},), one time for each of the latents")
        embedded = self.embed_condition(t, condition)
        tokens = self.embed(x)
        tokens = run_blocks(self.blocks(), tokens, self.rotations(tokens), embedded)
        return self.final_layer(tokens, embedded).to(x.dtype)
