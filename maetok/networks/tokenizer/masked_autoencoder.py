"""The autoencoder that stage 1 trains: the tokenizer and its auxiliary decoders."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from maetok.networks.layers.patches import grid_of, unpatchify
from maetok.networks.layers.vit import Block, ModulatedBlock, TransformerSize
from maetok.networks.tokenizer.decoder import Decoder, LinearDecoder
from maetok.networks.tokenizer.encoder import Encoder
from maetok.networks.tokenizer.tokenizer import Tokenizer


@dataclass
class MaskedAutoencoderOutput:
    """Result of one training forward pass."""

    reconstructions: Tensor
    """(B, 3, H, W), about [-1, 1]."""
    predictions: dict[str, Tensor]
    """Per target (B, N, dim), dim as the target has."""
    losses: dict[str, Tensor]
    """Named, weighted losses of the bottleneck."""


class MaskedAutoencoder(nn.Module):
    """A tokenizer plus one shallow auxiliary decoder per feature target, dropped after stage 1 (paper section 3.2).

    Args:
        tokenizer: the autoencoder.
        target_dims: values per patch of each target, by name.
        depth: layers of an auxiliary decoder (paper: 3), or ``"linear"`` for a linear map.

    Raises:
        ValueError: if ``depth`` is less than 1: without a layer predictions would not depend on the latents.
    """

    def __init__(self, tokenizer: Tokenizer, target_dims: dict[str, int], depth: int | Literal["linear"] = 3) -> None:
        super().__init__()
        if depth != "linear" and depth < 1:
            raise ValueError(f"model.init_args.auxiliary_depth={depth} must be at least 1, or linear")
        self.tokenizer = tokenizer
        with next(tokenizer.parameters()).device:  # the meta device too
            decoders = {name: auxiliary_decoder(tokenizer, dim, depth) for name, dim in target_dims.items()}
        self.auxiliary_decoders = nn.ModuleDict(decoders)

    def forward(self, images: Tensor, mask: Tensor | None = None) -> MaskedAutoencoderOutput:
        """Encode masked images (B, 3, H, W) in [-1, 1] with mask (B, N), reconstruct pixels and predict all targets."""
        latents, losses = self.tokenizer.encode_with_losses(images, mask)
        grid = grid_of(images, self.tokenizer.patch_size)
        reconstructions = unpatchify(self.tokenizer.decoder(latents, grid), grid)
        predictions = {name: decoder(latents, grid) for name, decoder in self.auxiliary_decoders.items()}
        return MaskedAutoencoderOutput(reconstructions, predictions, losses)

    def parts(self) -> list[nn.Module]:
        """The modules that are called, each as a whole: units of sharding."""
        tokenizer = self.tokenizer
        return [tokenizer.encoder, tokenizer.bottleneck, tokenizer.decoder, *self.auxiliary_decoders.values()]

    def compile_blocks(self) -> None:
        """Compile every transformer block in place; names in the state dict stay as they are.

        Each length of a sequence gets kernels of its own, unless masked patches are dropped, where there are many. Two
        never fit: activation checkpointing has to meet in the backward pass the one that ran in the forward pass. All
        blocks share one code, whose kinds of calls (with and without padding, last block) are more than torch's usual
        8.
        """
        dynamic = self.tokenizer.mask_mode == "drop"
        for module in self.modules():
            if isinstance(module, Block | ModulatedBlock):
                module.compile(dynamic=dynamic, recompile_limit=32)

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """Recompute the activations of every transformer block in the backward pass, to save memory."""
        for module in self.modules():
            if isinstance(module, Encoder | Decoder):
                module.activation_checkpointing = enabled


def auxiliary_decoder(tokenizer: Tokenizer, dim: int, depth: int | Literal["linear"]) -> nn.Module:
    """A decoder of ``dim`` values per patch, of the same design as the pixel decoder but with ``depth`` layers."""
    if depth == "linear":
        return LinearDecoder(tokenizer.grid, dim, tokenizer.latent_tokens, tokenizer.latent_channels)
    size = tokenizer.decoder_size
    return Decoder(
        tokenizer.grid,
        dim,
        tokenizer.latent_tokens,
        tokenizer.latent_channels,
        TransformerSize(size.width, depth, size.num_heads, size.mlp_ratio),
        positions=tokenizer.decoder_positions,
        rope_theta=tokenizer.rope_theta,
    )
