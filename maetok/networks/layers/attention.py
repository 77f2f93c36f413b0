"""Multi-head attention. One function chooses the fastest kernel."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maetok.networks.layers.rope import Rotation, rotate

CPU_HAS_BFLOAT16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
"""Whether this CPU has matrix instructions for bfloat16; without them float32 is many times faster."""

PLAIN_ATTENTION_MAX_TOKENS = {torch.float32: 512, torch.bfloat16: 1024 if CPU_HAS_BFLOAT16 else 0}
"""Up to this number of tokens, matmul-softmax-matmul beats the fused kernel on a CPU, mainly in the backward pass."""


def attention(queries: Tensor, keys: Tensor, values: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """Compute softmax attention with scale ``head_dim ** -0.5``.

    Accelerators and long sequences use the fused kernel (SDPA). On a CPU the plain formula is faster up to
    ``PLAIN_ATTENTION_MAX_TOKENS`` tokens, except in bfloat16 on a CPU without instructions for it, where it is many
    times slower. The two results differ only by rounding.

    Args:
        queries: (B, heads, T, head_dim).
        keys: (B, heads, S, head_dim).
        values: (B, heads, S, head_dim).
        key_mask: (B, S) bool, False for keys without weight; by default all keys have weight.

    Returns:
        (B, heads, T, head_dim), dtype of the inputs.
    """
    allowed = None if key_mask is None else key_mask[:, None, None]
    if plain_is_faster(queries.device.type, queries.dtype, keys.shape[-2]):
        scores = (queries * queries.shape[-1] ** -0.5) @ keys.transpose(-2, -1)
        if allowed is not None:
            scores = scores.masked_fill(~allowed, float("-inf"))
        with torch.autocast(queries.device.type, enabled=False):  # float32 softmax gives the same, but converts twice
            return scores.softmax(dim=-1) @ values
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=allowed)


def plain_is_faster(device: str, dtype: torch.dtype, tokens: int) -> bool:
    """Return whether matmul-softmax-matmul beats the fused kernel for this device, dtype and number of keys."""
    return device == "cpu" and tokens <= PLAIN_ATTENTION_MAX_TOKENS.get(dtype, 0)


class Attention(nn.Module):
    """Self-attention with one fused projection and an optional rotary embedding of queries and keys.

    Args:
        width: token width; must be divisible by ``num_heads``.
        num_heads: number of attention heads.

    Raises:
        ValueError: if ``width`` is not divisible by ``num_heads``.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"width={width} is not divisible by num_heads={num_heads}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(
        self,
        tokens: Tensor,
        rotation: Rotation | None = None,
        key_mask: Tensor | None = None,
        outputs: slice | None = None,
    ) -> Tensor:
        """Attend: (B, T, width) -> (B, T, width), or (B, S, width) with queries of the S tokens of ``outputs`` only.

        See :func:`attention` for ``key_mask`` (B, T).
        """
        qkv = self.qkv(tokens).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if rotation is None:
            queries, keys, values = qkv.unbind(0)
        else:
            queries, keys = rotate(qkv[:2], rotation).unbind(0)
            values = qkv[2]
        if outputs is not None:
            queries = queries[..., outputs, :]
        found = attention(queries, keys, values, key_mask)
        return self.proj(found.transpose(1, 2).flatten(2))
