"""What the denoisers of latent diffusion share: their contract, their parts, and the transformer they are built on.

A denoiser predicts the velocity e - x of the path x_t = (1 - t) x + t e from data (t = 0) to noise (t = 1), for
latents that were normalised before (paper section 3.3; SiT, arXiv 2401.08740; DiT, arXiv 2212.09748).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maetok.networks.layers.attention import Attention
from maetok.networks.layers.rope import Rotation
from maetok.networks.layers.vit import TransformerSize, run_blocks

SIZES = {
    "S": TransformerSize(384, 12, 6),
    "B": TransformerSize(768, 12, 12),
    "L": TransformerSize(1024, 24, 16),
    "XL": TransformerSize(1152, 28, 16),
}
"""The sizes that SiT-S/1 to SiT-XL/1 and LightningDiT stand for (DiT, table 1)."""


class Denoiser(nn.Module, ABC):
    """The contract of a denoiser: whatever fulfils it can be trained and sampled from.

    Args:
        latent_tokens: number L of latent tokens.
        latent_channels: channels C of each.
        num_classes: number of classes; also the null label, which means "no class".
    """

    def __init__(self, latent_tokens: int, latent_channels: int, num_classes: int) -> None:
        super().__init__()
        self.latent_tokens, self.latent_channels, self.num_classes = latent_tokens, latent_channels, num_classes
        self.activation_checkpointing = False

    @abstractmethod
    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Predict the velocity.

        Args:
            x: (B, L, C) float, normalised latents with noise, x_t = (1 - t) x + t e.
            t: (B,) float in [0, 1]; 0 is data, 1 is noise.
            labels: (B,) int64 in [0, num_classes]; ``num_classes`` is the null label.

        Returns:
            (B, L, C), the velocity e - x, in the dtype of ``x``.

        Raises:
            ValueError: if the shapes do not fit this denoiser or each other.
        """

    def parts(self) -> list[nn.Module]:
        """The modules that are called, each as a whole: units of sharding."""
        return [self]

    def compile_blocks(self) -> None:
        """Compile every transformer block in place; names in the state dict stay as they are."""
        for module in self.modules():
            if isinstance(module, ConditionedBlock):
                module.compile()

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """Recompute the activations of every transformer block in the backward pass, to save memory."""
        self.activation_checkpointing = enabled


def drop_labels(labels: Tensor, uniform: Tensor, probability: float, null_label: int) -> Tensor:
    """Replace labels by the null label with a given probability, as classifier-free guidance needs it in training.

    Args:
        labels: (B,) int64.
        uniform: (B,) in [0, 1), random numbers that the caller supplies.
        probability: share of labels to drop, in [0, 1] (paper: 0.1).
        null_label: what stands for "no class", ``num_classes`` of the denoiser.

    Returns:
        (B,) int64: ``null_label`` where ``uniform < probability``, otherwise the label.
    """
    return torch.where(uniform < probability, null_label, labels)


def modulate(tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """``h * (1 + scale) + shift`` of tokens (B, T, width) with shift and scale (B, width) each."""
    return tokens * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class TimeEmbedder(nn.Module):
    """Embeds times by 128 cosines and 128 sines of geometrically spaced frequencies and a two-layer MLP.

    t in [0, 1] is *not* multiplied by 1000, as the released weights want it.

    Args:
        width: size of the embedding.
    """

    FREQUENCIES, BASE = 128, 10000.0

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * self.FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """t (B,) float in [0, 1] -> (B, width). Angles are float32 under autocast too."""
        exponents = torch.arange(self.FREQUENCIES, device=t.device, dtype=torch.float32) / self.FREQUENCIES
        angles = t.float()[:, None] * torch.exp(-math.log(self.BASE) * exponents)
        return self.mlp(torch.cat((angles.cos(), angles.sin()), dim=-1).to(next(self.mlp.parameters()).dtype))


class NormalizedProjection(nn.Linear):
    """The fused projection of an attention layer, with queries and keys normalised per head (qk-norm).

    Args:
        width: token width.
        num_heads: attention heads.
        norm: makes the normalisation of vectors of head_dim channels.
    """

    def __init__(self, width: int, num_heads: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__(width, 3 * width)
        self.num_heads = num_heads
        self.query_norm, self.key_norm = norm(width // num_heads), norm(width // num_heads)

    def forward(self, input: Tensor) -> Tensor:
        """(B, T, width) -> (B, T, 3 * width), laid out as [queries | keys | values], each by heads.

        Under autocast the normalisation is computed in float32.
        """
        projected = super().forward(input)
        queries, keys, values = projected.unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        precise = next(self.query_norm.parameters()).dtype
        queries, keys = self.query_norm(queries.to(precise)), self.key_norm(keys.to(precise))
        return torch.stack((queries.to(values.dtype), keys.to(values.dtype), values), dim=-3).flatten(-3)


class ConditionedBlock(nn.Module):
    """Transformer block whose condition shifts, scales and gates attention and MLP ("adaLN-zero", DiT section 3.2).

    All gates start at zero, so a new block passes its input on.

    Args:
        size: width and heads.
        norm: makes a normalisation of ``width`` channels.
        mlp: the block's MLP, (B, T, width) -> (B, T, width).
        query_key_norm: makes the normalisation of queries and keys of one head; none by default.
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
        """(B, T, width), condition (B, width) after its nonlinearity -> (B, T, width)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).chunk(6, dim=-1)
        tokens = tokens + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(tokens), shift1, scale1), rotation)
        return tokens + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(tokens), shift2, scale2))


class FinalLayer(nn.Module):
    """Normalisation modulated by the condition, then a linear map; both start at zero, and so does the velocity.

    Args:
        width: token width.
        channels: channels C of a latent.
        norm: makes a normalisation of ``width`` channels.
    """

    def __init__(self, width: int, channels: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.norm = norm(width)
        self.modulation = nn.Linear(width, 2 * width)
        self.linear = nn.Linear(width, channels)

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        """(B, L, width), condition (B, width) after its nonlinearity -> (B, L, C)."""
        shift, scale = self.modulation(condition).chunk(2, dim=-1)
        return self.linear(modulate(self.norm(tokens), shift, scale))


class DiffusionTransformer(Denoiser):
    """A transformer over latent tokens (patch size 1) that knows time and class through adaLN-zero.

    What differs between SiT and LightningDiT is given: normalisation, MLP and, by overriding :meth:`embed` or
    :meth:`rotations`, positions.

    Args:
        latent_tokens: number L of latent tokens.
        latent_channels: channels C of each.
        num_classes: number of classes; also the null label.
        size: width, depth, heads and MLP ratio.
        norm: makes a normalisation of a given number of channels.
        mlp: makes the MLP of a block.
        query_key_norm: makes the normalisation of queries and keys of one head; none by default.

    Raises:
        ValueError: if the width is not divisible by the number of heads.
    """

    def __init__(
        self,
        latent_tokens: int,
        latent_channels: int,
        num_classes: int,
        size: TransformerSize,
        norm: Callable[[int], nn.Module],
        mlp: Callable[[TransformerSize], nn.Module],
        query_key_norm: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__(latent_tokens, latent_channels, num_classes)
        self.size = size
        self.input = nn.Linear(latent_channels, size.width)
        self.time_embedder = TimeEmbedder(size.width)
        self.label_embedder = nn.Embedding(num_classes + 1, size.width)
        self.blocks = nn.ModuleList(ConditionedBlock(size, norm, mlp(size), query_key_norm) for _ in range(size.depth))
        self.final_layer = FinalLayer(size.width, latent_channels, norm)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """DiT's initialisation: Xavier for linear layers, 0.02 for embeddings, zero for modulation and output."""
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
        """Tokens (B, L, width) that enter the first block.

        Under autocast they have the dtype of ``x`` again, and so have all sums of residual branches.
        """
        return self.input(x).to(x.dtype)

    def rotations(self, tokens: Tensor) -> list[Rotation] | None:
        """Rotations of queries and keys in each block for tokens (B, L, width); none by default."""
        return None

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Predict the velocity (B, L, C); see :meth:`Denoiser.forward`."""
        batch = x.shape[0]
        if x.shape[1:] != (self.latent_tokens, self.latent_channels):
            expected = f"(B, {self.latent_tokens}, {self.latent_channels})"
            raise ValueError(f"latents have shape {tuple(x.shape)}, expected {expected}")
        if t.shape != (batch,) or labels.shape != (batch,):
            shapes = f"t {tuple(t.shape)} and labels {tuple(labels.shape)}"
            raise ValueError(f"{shapes} must both have shape ({batch},), one value for each of the latents")
        condition = F.silu(self.time_embedder(t) + self.label_embedder(labels))
        tokens = self.embed(x)
        tokens = run_blocks(
            self.blocks,
            tokens,
            self.rotations(tokens),
            condition,
            activation_checkpointing=self.activation_checkpointing,
        )
        return self.final_layer(tokens, condition).to(x.dtype)
