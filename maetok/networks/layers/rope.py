"""Mixed 2D rotary position embedding: every layer and head learns its own frequencies for both axes.

A pair of channels at column x and row y is rotated by (paper section 3.1; the released weights use this mixed form):
    angle = x * frequency_x + y * frequency_y,  x, y = 0, 1, 2, ... neither centred nor scaled.
"""

import math

import torch
from torch import Tensor, nn

Rotation = tuple[Tensor, Tensor]
"""cos and sin, each (heads, T, head_dim / 2) or (B, heads, T, head_dim / 2), in the dtype of the queries."""


def rotate(queries_or_keys: Tensor, rotation: Rotation) -> Tensor:
    """Rotate adjacent channel pairs (2i, 2i + 1) by the given angles.

    A complex product computes this where it is faster; compiled code and other cases use real products.

    Args:
        queries_or_keys: (..., heads, T, head_dim).
        rotation: cos and sin, (heads, T, head_dim / 2) each, or (B, heads, T, head_dim / 2).

    Returns:
        A tensor of the shape and dtype of the input.
    """
    cos, sin = rotation
    dtype = queries_or_keys.dtype
    if not torch.compiler.is_compiling() and complex_is_faster(queries_or_keys.device.type, dtype):
        wide = torch.promote_types(dtype, torch.float32)
        pairs = torch.view_as_complex(queries_or_keys.to(wide).unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * torch.complex(cos.to(wide), sin.to(wide))).flatten(-2).to(dtype)
    even, odd = queries_or_keys.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def complex_is_faster(device: str, dtype: torch.dtype) -> bool:
    """Return whether one complex product beats six real operations: without a conversion, or on any CPU."""
    return dtype in (torch.float32, torch.float64) or device == "cpu"


def select(rotation: Rotation, positions: Tensor) -> Rotation:
    """Return the rotations (B, heads, K, head_dim / 2) of the tokens at ``positions`` (B, K) of a sequence."""
    cos, sin = rotation
    index = positions[:, None, :, None]
    return cos[None].take_along_dim(index, dim=2), sin[None].take_along_dim(index, dim=2)


def compute_dtype(reference: Tensor) -> torch.dtype:
    """Return the dtype of a linear layer's result for ``reference``: autocast's dtype, or its own."""
    return torch.get_autocast_dtype(reference.device.type) if autocasts(reference) else reference.dtype


def autocasts(reference: Tensor) -> bool:
    """Return whether operations on the device of ``reference`` run under autocast; the meta device has none."""
    device = reference.device.type
    return device != "meta" and torch.is_autocast_enabled(device)


class MixedRotaryEmbedding2d(nn.Module):
    """Learned 2D rotary frequencies for all layers of one transformer, turned into angles once per forward pass.

    Angles are computed in float32, under autocast too. Outside of training they are cached for one grid and recomputed
    only if the frequencies change. :meth:`stop_caching` turns the cache off.

    Args:
        depth: number of layers.
        num_heads: attention heads per layer.
        head_dim: channels per head, divisible by 4.
        theta: base of the geometric series of initial frequencies.

    Raises:
        ValueError: if ``head_dim`` is not divisible by 4.
    """

    def __init__(self, depth: int, num_heads: int, head_dim: int, theta: float = 10.0) -> None:
        super().__init__()
        if head_dim % 4:
            raise ValueError(f"a 2D rotary embedding needs width / num_heads divisible by 4, got {head_dim}")
        magnitudes = theta ** (-torch.arange(0, head_dim, 4).float() / head_dim)
        direction = torch.rand(depth, num_heads, 1) * 2 * math.pi
        both = torch.cat(
            (direction.expand(-1, -1, head_dim // 4), (direction + math.pi / 2).expand(-1, -1, head_dim // 4)), -1
        )
        frequencies = torch.stack((both.cos(), both.sin())) * magnitudes.repeat(2)
        self.frequencies = nn.Parameter(frequencies)  # (2, depth, heads, head_dim / 2); index 0 is x, the column
        self.caches = True  # until stop_caching
        self._cache: dict[tuple, list[Rotation]] = {}

    def stop_caching(self) -> None:
        """Compute the angles in every forward pass from now on.

        FSDP2 gathers weights into the same memory again and again, which the version counter does not show.
        """
        self.caches = False

    def angles(self, grid: tuple[int, int]) -> Tensor:
        """Return float32 angles (depth, heads, N, head_dim / 2) of a (rows, columns) grid of patches."""
        rows, columns = grid
        device = self.frequencies.device
        x = torch.arange(columns, device=device, dtype=torch.float32).repeat(rows)
        y = torch.arange(rows, device=device, dtype=torch.float32).repeat_interleave(columns)
        frequencies_x, frequencies_y = self.frequencies.float().unsqueeze(-2).unbind(0)
        return x[:, None] * frequencies_x + y[:, None] * frequencies_y

    def forward(self, grid: tuple[int, int], before: int, after: int, dtype: torch.dtype) -> list[Rotation]:
        """Return the rotations of each layer for the sequence [``before`` tokens | grid | ``after`` tokens].

        Tokens outside the grid (class, register and latent tokens) have angle zero, so they are not rotated.

        Returns:
            One (cos, sin) pair per layer, each (heads, before + N + after, head_dim / 2) in ``dtype``.
        """
        if torch.compiler.is_compiling():
            return self._rotations(grid, before, after, dtype)
        if torch.is_grad_enabled() or not self.caches:
            self._cache = {}  # a fused optimizer changes the frequencies without raising their version
            return self._rotations(grid, before, after, dtype)
        frequencies = self.frequencies
        version = 0 if frequencies.is_inference() else frequencies._version
        key = (grid, before, after, dtype, frequencies.device, frequencies.data_ptr(), version)
        if key not in self._cache:
            self._cache = {key: self._rotations(grid, before, after, dtype)}
        return self._cache[key]

    def _rotations(self, grid: tuple[int, int], before: int, after: int, dtype: torch.dtype) -> list[Rotation]:
        angles = nn.functional.pad(self.angles(grid), (0, 0, before, after))
        return list(zip(angles.cos().to(dtype).unbind(0), angles.sin().to(dtype).unbind(0), strict=True))
