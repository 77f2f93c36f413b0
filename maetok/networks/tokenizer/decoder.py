"""ViT decoder: latents in, one vector per image patch out. Serves pixels and, with few layers, auxiliary targets."""

import math

import torch
from torch import Tensor, nn

from maetok.networks.layers.network import Blocks, Network
from maetok.networks.layers.rope import compute_dtype
from maetok.networks.layers.vit import (
    Block,
    LayerNorm,
    ModulatedBlock,
    Positions,
    TransformerSize,
    initialize,
    position_table,
    resize_position_table,
    rotary_embedding,
    run_blocks,
)


class Decoder(Network):
    """Reads [N copies of a mask token | L projected latents] and projects the N image positions to ``output_dim``.

    Args:
        grid: (rows, columns) of patches at the training resolution; only an absolute position table depends on it.
        output_dim: values per patch, e.g. ``3 * patch_size ** 2`` for pixels.
        latent_tokens: number L of latents.
        latent_channels: channels C of a latent.
        size: transformer size.
        positions: position information on image tokens.
        rope_theta: base of the rotary frequencies.
        class_token: put a learned token in front, as some released decoders do.
        layer_scale: initial residual scale of plain blocks.
        latent_modulation: use the blocks of the released "movqv2" decoder.
    """

    def __init__(
        self,
        grid: tuple[int, int],
        output_dim: int,
        latent_tokens: int,
        latent_channels: int,
        size: TransformerSize,
        positions: Positions = "rotary",
        rope_theta: float = 10.0,
        class_token: bool = False,
        layer_scale: float = 1.0,
        latent_modulation: bool = False,
    ) -> None:
        super().__init__()
        width = size.width
        self.grid = grid
        self.latent_projection = nn.Linear(latent_channels, width)
        # As large as the projected latents: only these tell one latent token from another.
        self.latent_positions = nn.Parameter(torch.randn(1, latent_tokens, width))
        self.mask_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.class_token = nn.Parameter(torch.randn(1, 1, width) * 0.02) if class_token else None
        has_table = positions != "rotary"
        self.position_table = position_table(int(class_token), grid, width) if has_table else None
        self.rope = rotary_embedding(positions, size, rope_theta)
        self.blocks = Blocks(
            ModulatedBlock(size, latent_channels) if latent_modulation else Block(size, layer_scale)
            for _ in range(size.depth)
        )
        self.norm = LayerNorm(width, eps=1e-6, elementwise_affine=not latent_modulation)
        self.output = nn.Linear(width, output_dim)
        initialize(self)

    def float32_modules(self) -> list[nn.Module]:
        """Return the rotary embedding, whose angles need float32."""
        return [] if self.rope is None else [self.rope]

    def embed(self, latents: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return the tokens (B, P + N + L, width) that enter the first block."""
        batch = latents.shape[0]
        image_tokens = self.mask_token.expand(1, math.prod(grid), -1)
        if self.class_token is not None:
            image_tokens = torch.cat((self.class_token, image_tokens), dim=1)
        if self.position_table is not None:
            image_tokens = image_tokens + resize_position_table(self.position_table, self.grid, grid)
        return torch.cat(
            (image_tokens.expand(batch, -1, -1), self.latent_projection(latents) + self.latent_positions), dim=1
        )

    def forward(self, latents: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Decode latents.

        Args:
            latents: (B, L, C).
            grid: (rows, columns) of the wanted patches; the training grid if not given.

        Returns:
            (B, N, output_dim), patches in raster order.

        Raises:
            ValueError: if the number of latents or channels does not fit this decoder.
        """
        expected = (self.latent_positions.shape[1], self.latent_projection.in_features)
        if latents.shape[1:] != expected:
            raise ValueError(f"latents have shape {tuple(latents.shape)}, expected (B, {expected[0]}, {expected[1]})")
        grid = grid or self.grid
        tokens = self.embed(latents, grid)
        patches, before = math.prod(grid), int(self.class_token is not None)
        rotations = None
        if self.rope is not None:
            rotations = self.rope(grid, before, latents.shape[1], compute_dtype(tokens))
        tokens = run_blocks(
            self.blocks(),
            tokens,
            rotations,
            latents,
            outputs=slice(before, before + patches),
        )
        return self.output(self.norm(tokens))


class LinearDecoder(Network):
    """The "linear" auxiliary decoder of the ablation: a linear map over tokens, then one over channels.

    It mixes the L latents into N positions and the C channels into ``output_dim`` values, nothing else, and so works
    only at the resolution it was built for.
    """

    def __init__(self, grid: tuple[int, int], output_dim: int, latent_tokens: int, latent_channels: int) -> None:
        super().__init__()
        self.grid = grid
        self.token_mixer = nn.Linear(latent_tokens, math.prod(grid))
        self.output = nn.Linear(latent_channels, output_dim)
        initialize(self)

    def blocks(self) -> list[nn.Module]:
        """Return nothing: a linear decoder repeats no block."""
        return []

    def forward(self, latents: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Decode (B, L, C) -> (B, N, output_dim); raise ValueError for another grid than the training grid."""
        if grid is not None and grid != self.grid:
            raise ValueError(f"a linear auxiliary decoder is tied to its grid {self.grid}, asked for {grid}")
        return self.output(self.token_mixer(latents.transpose(1, 2)).transpose(1, 2))
