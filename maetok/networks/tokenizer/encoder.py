"""ViT encoder: images in, one embedding per learned latent token out (paper section 3.1)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maetok.networks.layers.network import Blocks, Network
from maetok.networks.layers.patches import grid_of
from maetok.networks.layers.rope import compute_dtype, select
from maetok.networks.layers.vit import (
    Block,
    LayerNorm,
    Positions,
    TransformerSize,
    initialize,
    position_table,
    resize_position_table,
    rotary_embedding,
    run_blocks,
)
from maetok.networks.tokenizer.masking import VisiblePatches


class Encoder(Network):
    """Reads [class token, registers | N image patches | L latent tokens] and returns the L latent positions.

    Of a masked image it reads a mask token in place of each masked patch (paper section 3.1), or the visible patches
    alone (as MAE does, He et al. 2022): latents are a function of these then, and a step costs less.

    Args:
        grid: (rows, columns) of patches at the training resolution; only an absolute position table depends on it.
        patch_size: side of a square patch in pixels.
        latent_tokens: number L of learned latent tokens.
        size: transformer size.
        positions: position information on image tokens.
        rope_theta: base of the rotary frequencies.
        register_tokens: extra learned prefix tokens after the class token.
        layer_scale: initial residual scale.
        mask_token: whether there is a token that stands for masked patches.
    """

    def __init__(
        self,
        grid: tuple[int, int],
        patch_size: int,
        latent_tokens: int,
        size: TransformerSize,
        positions: Positions = "rotary",
        rope_theta: float = 10.0,
        register_tokens: int = 0,
        layer_scale: float = 1.0,
        mask_token: bool = True,
    ) -> None:
        super().__init__()
        width = size.width
        self.grid, self.patch_size = grid, patch_size
        self.patch_embedding = nn.Conv2d(3, width, patch_size, stride=patch_size)
        self.class_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.register_tokens = nn.Parameter(torch.randn(1, register_tokens, width) * 0.02) if register_tokens else None
        self.mask_token = nn.Parameter(torch.randn(1, 1, width) * 0.02) if mask_token else None
        self.latent_tokens = nn.Parameter(torch.randn(1, latent_tokens, width))
        self.latent_positions = nn.Parameter(torch.randn(1, latent_tokens, width) * 0.02)
        # As in the released weights, the class token has a slot in the table only when there are no registers.
        has_table = positions != "rotary"
        self.position_table = position_table(0 if register_tokens else 1, grid, width) if has_table else None
        self.rope = rotary_embedding(positions, size, rope_theta)
        self.blocks = Blocks(Block(size, layer_scale) for _ in range(size.depth))
        self.norm = LayerNorm(width, eps=1e-6)
        initialize(self)

    def float32_modules(self) -> list[nn.Module]:
        """Return the rotary embedding, whose angles need float32."""
        return [] if self.rope is None else [self.rope]

    def embed(self, images: Tensor, mask: Tensor | None) -> Tensor:
        """Return the tokens (B, P + N + L, width) that enter the first block."""
        grid = grid_of(images, self.patch_size)
        patches = self.patch_embedding(images).flatten(2).transpose(1, 2)
        if mask is not None:
            if self.mask_token is None:
                raise ValueError(
                    "this encoder has no mask token (it was built with mask_token=False): pass visible patches"
                )
            patches = torch.where(mask[..., None], self.mask_token.to(patches.dtype), patches)
        prefix: Tensor = self.class_token
        if self.position_table is not None:
            table = resize_position_table(self.position_table, self.grid, grid)
            slots = table.shape[1] - math.prod(grid)
            patches = patches + table[:, slots:]
            prefix = prefix + table[:, :slots] if slots else prefix
        if self.register_tokens is not None:
            prefix = torch.cat((prefix, self.register_tokens), dim=1)
        latent_tokens = self.latent_tokens + self.latent_positions
        batch = images.shape[0]
        return torch.cat((prefix.expand(batch, -1, -1), patches, latent_tokens.expand(batch, -1, -1)), dim=1)

    def forward(self, images: Tensor, mask: Tensor | None = None, visible: VisiblePatches | None = None) -> Tensor:
        """Encode images.

        Args:
            images: (B, 3, H, W) float in [-1, 1], both sides divisible by the patch size.
            mask: (B, N) bool, True = the patch is replaced by the mask token before positions are added.
            visible: the patches that stay in the sequence; all if not given.

        Returns:
            (B, L, width), the normalised latent positions.

        Raises:
            ValueError: if the image size does not fit, or there is a mask but no mask token.
        """
        grid = grid_of(images, self.patch_size)
        tokens = self.embed(images, mask)
        latents = self.latent_tokens.shape[1]
        before = tokens.shape[1] - math.prod(grid) - latents
        rotations = None if self.rope is None else self.rope(grid, before, latents, compute_dtype(tokens))
        key_mask = None
        if visible is not None:
            positions = sequence_positions(visible.indices, before, tokens.shape[1] - latents, latents)
            tokens = tokens.take_along_dim(positions[..., None], dim=1)
            rotations = None if rotations is None else [select(rotation, positions) for rotation in rotations]
            if visible.present is not None:
                key_mask = F.pad(visible.present, (before, latents), value=True)
        tokens = run_blocks(
            self.blocks(),
            tokens,
            rotations,
            None,
            key_mask,
            outputs=slice(-latents, None),  # the same for all lengths, so compiled blocks fit all
        )
        return self.norm(tokens)


def sequence_positions(patches: Tensor, before: int, end: int, latents: int) -> Tensor:
    """Return the positions of all prefix tokens, these ``patches`` (B, K) and all latent tokens in the sequence.

    Returns:
        (B, before + K + L) int64; the whole sequence has patches from ``before`` on and latent tokens from ``end`` on.
    """
    batch, device = patches.shape[0], patches.device
    prefix = torch.arange(before, device=device).expand(batch, -1)
    suffix = torch.arange(end, end + latents, device=device).expand(batch, -1)
    return torch.cat((prefix, patches + before, suffix), dim=1)
