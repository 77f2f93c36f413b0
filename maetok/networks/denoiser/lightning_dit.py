"""LightningDiT over 1D latent tokens: DiT with RMSNorm, SwiGLU and rotary positions (arXiv 2501.01423)."""

from functools import partial

import torch
from timm.layers.mlp import SwiGLUPacked
from torch import Tensor, nn

from maetok.networks.denoiser.transformer import SIZES, DiffusionTransformer
from maetok.networks.layers.rope import Rotation, compute_dtype
from maetok.networks.layers.vit import TransformerSize


def rotary_angles(positions: Tensor, head_dim: int, theta: float = 10000.0) -> Tensor:
    """Return the angles (T, head_dim / 2) float32 of 1D rotary positions (RoFormer, arXiv 2104.09864).

    The pair of channels (2i, 2i + 1) at position p is rotated by p * theta ** (-2i / head_dim).

    Args:
        positions: (T,) of any dtype.
        head_dim: channels per head, even.
        theta: base of the geometric series of frequencies.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    return positions.float()[:, None] * theta**-exponents


def swiglu(size: TransformerSize) -> nn.Module:
    """Build a gated MLP ``fc2(silu(a) * b)`` with [a | b] = fc1(h), as large as an ordinary MLP (arXiv 2002.05202).

    It has three matrices instead of two, so the hidden size is 2/3 of ``mlp_ratio * width``, rounded down.
    """
    hidden = int(size.width * size.mlp_ratio) * 2 // 3
    return SwiGLUPacked(size.width, 2 * hidden)


class LightningDiT(DiffusionTransformer):
    """LightningDiT with patch size 1: 1D rotary positions over the token index, RMSNorm, SwiGLU, adaLN-zero.

    The defaults are LightningDiT-XL/1 for 128 latent tokens of 32 channels and ImageNet's classes.

    Args:
        latent_tokens: number L of latent tokens.
        latent_channels: channels C of each.
        num_classes: number of classes, which is also the null label; None or 0 for a denoiser without labels.
        size: any size; :data:`maetok.networks.denoiser.transformer.SIZES` and ``configs/size`` have the usual ones.
        qk_norm: normalise queries and keys of each head (RMSNorm, eps 1e-6) before they are rotated.
        rope_theta: base of the rotary frequencies.

    Raises:
        ValueError: if width / num_heads is not an even integer.
    """

    def __init__(
        self,
        latent_tokens: int = 128,
        latent_channels: int = 32,
        num_classes: int | None = 1000,
        size: TransformerSize = SIZES["XL"],
        qk_norm: bool = False,
        rope_theta: float = 10000.0,
    ) -> None:
        if size.head_dim % 2:
            raise ValueError(f"a rotary embedding needs width / num_heads divisible by 2, got {size.head_dim}")
        norm = partial(nn.RMSNorm, eps=1e-6)
        super().__init__(
            latent_tokens,
            latent_channels,
            num_classes,
            size,
            norm=norm,
            mlp=swiglu,
            query_key_norm=norm if qk_norm else None,
        )
        self.qk_norm, self.rope_theta = qk_norm, rope_theta

    def rotations(self, tokens: Tensor) -> list[Rotation]:
        """Return one rotation for all blocks and heads: cos, sin (1, L, head_dim / 2) in the dtype of the queries."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        angles = rotary_angles(positions, self.size.head_dim, self.rope_theta)[None]
        dtype = compute_dtype(tokens)
        return [(angles.cos().to(dtype), angles.sin().to(dtype))] * self.size.depth
