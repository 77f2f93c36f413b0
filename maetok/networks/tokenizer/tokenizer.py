"""The tokenizer: encoder, bottleneck and pixel decoder."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from maetok.networks.folder import locate, read_config, read_tensors, write_folder
from maetok.networks.layers.network import Network
from maetok.networks.layers.patches import as_pair, grid_of, patch_grid, unpatchify
from maetok.networks.layers.vit import Positions, TransformerSize
from maetok.networks.tokenizer.bottlenecks import Bottleneck, PlainBottleneck
from maetok.networks.tokenizer.decoder import Decoder, LinearDecoder
from maetok.networks.tokenizer.encoder import Encoder
from maetok.networks.tokenizer.masking import visible_patches
from maetok.networks.tokenizer.published import (
    REQUIRED_KEYS,
    SIZE_OVERRIDES,
    load_published_state,
    published_config,
    to_published_name,
    tokenizer_arguments,
    unused_tensors,
)
from maetok.runtime.weights import weights_hash


class Tokenizer(Network):
    """MAETok's autoencoder: a ViT encoder with L latent tokens, a bottleneck, and a ViT pixel decoder.

    The defaults are MAETok-B/16 with 128 latent tokens of 32 channels (paper section 3.1).

    Args:
        image_size: training resolution, a side length or (height, width); other sizes work at run time.
        patch_size: side of a square patch.
        latent_tokens: number L of latent tokens.
        bottleneck: called with the encoder width; decides the latent channels C.
        encoder: size of the encoder.
        decoder: size of the pixel decoder.
        encoder_positions: position information on the encoder's image tokens.
        decoder_positions: the same for the decoder.
        rope_theta: base of the initial rotary frequencies.
        register_tokens: extra prefix tokens of the encoder.
        decoder_class_token: put a learned token in front of the decoder's sequence.
        layer_scale: initial residual scale in plain blocks.
        latent_modulation: use the released "movqv2" blocks in the pixel decoder.
        mask_mode: what becomes of masked patches in the encoder: a mask token takes their place (the paper's), or they
            are dropped from its sequence, as in MAE, and there is no mask token.

    Raises:
        ValueError: if ``image_size`` is not divisible by ``patch_size``, or for another mask mode.
    """

    def __init__(
        self,
        image_size: int | tuple[int, int] = 256,
        patch_size: int = 16,
        latent_tokens: int = 128,
        bottleneck: Callable[[int], Bottleneck] = PlainBottleneck,
        encoder: TransformerSize = TransformerSize(),  # noqa: B008 - frozen
        decoder: TransformerSize = TransformerSize(),  # noqa: B008 - frozen
        encoder_positions: Positions = "rotary",
        decoder_positions: Positions = "rotary",
        rope_theta: float = 10.0,
        register_tokens: int = 0,
        decoder_class_token: bool = False,
        layer_scale: float = 1.0,
        latent_modulation: bool = False,
        mask_mode: Literal["replace", "drop"] = "replace",
    ) -> None:
        super().__init__()
        if mask_mode not in ("replace", "drop"):
            raise ValueError(f"tokenizer.init_args.mask_mode={mask_mode!r} must be replace or drop")
        self.image_size, self.patch_size, self.latent_tokens = as_pair(image_size), patch_size, latent_tokens
        self.encoder_size, self.decoder_size, self.rope_theta = encoder, decoder, rope_theta
        self.encoder_positions, self.decoder_positions = encoder_positions, decoder_positions
        self.grid, self.mask_mode = patch_grid(image_size, patch_size), mask_mode
        self.encoder = Encoder(
            self.grid,
            patch_size,
            latent_tokens,
            encoder,
            positions=encoder_positions,
            rope_theta=rope_theta,
            register_tokens=register_tokens,
            layer_scale=layer_scale,
            mask_token=mask_mode == "replace",
        )
        self.bottleneck = bottleneck(encoder.width)
        self.decoder = Decoder(
            self.grid,
            3 * patch_size**2,
            latent_tokens,
            self.bottleneck.channels,
            decoder,
            positions=decoder_positions,
            rope_theta=rope_theta,
            class_token=decoder_class_token,
            layer_scale=layer_scale,
            latent_modulation=latent_modulation,
        )
        self.published_config: dict[str, Any] = {}  # set by from_pretrained, so that save_pretrained writes it back
        self.published_unused: dict[str, Tensor] = {}

    @property
    def latent_channels(self) -> int:
        """Return the channels C of a latent."""
        return self.bottleneck.channels

    @property
    def compile_options(self) -> dict[str, Any]:
        """Compile each length of a sequence separately, unless masked patches are dropped, which makes many lengths.

        One length never has two compiled versions: activation checkpointing must meet in the backward pass the version
        that ran in the forward pass. All blocks share one code, which is called in more ways (with and without padding,
        as the last block) than torch's usual limit of 8.
        """
        return {"dynamic": self.mask_mode == "drop", "recompile_limit": 32}

    def blocks(self) -> list[nn.Module]:
        """Return the transformer blocks of encoder and decoder."""
        return [*self.encoder.blocks(), *self.decoder.blocks()]

    def parts(self) -> list[nn.Module]:
        """Return encoder, bottleneck and decoder."""
        return [self.encoder, self.bottleneck, self.decoder]

    def float32_modules(self) -> list[nn.Module]:
        """Return the rotary embeddings and the bottleneck: distances to codewords need float32."""
        return [*self.encoder.float32_modules(), self.bottleneck, *self.decoder.float32_modules()]

    @property
    def latent_grid(self) -> tuple[int, int] | None:
        """Return None: latent tokens have no place in the image."""

    @property
    def latent_statistics(self) -> tuple[Tensor, Tensor] | None:
        """Return mean and scale (C,) float32 from a published config; None for a tokenizer trained here."""
        if not {"vq_mean", "vq_std"} <= self.published_config.keys():
            return None
        mean, std = (torch.tensor(self.published_config[key]).float() for key in ("vq_mean", "vq_std"))
        return mean.expand(self.latent_channels), std.expand(self.latent_channels)

    @property
    def last_layer(self) -> Tensor:
        """Return the weight (3 p^2, width) of the pixel decoder's output."""
        return self.decoder.output.weight

    def trainable_parameters(self, stage: int) -> list[nn.Parameter]:
        """Return all parameters for stage 1, and the pixel decoder's for stage 2."""
        return list((self if stage == 1 else self.decoder).parameters())

    def auxiliary_decoder(self, dim: int, depth: int | Literal["linear"]) -> Network:
        """Build a decoder of ``dim`` values per patch with ``depth`` layers, otherwise like the pixel decoder.

        Returns:
            A module that maps latents (B, L, C) and a grid to predictions (B, N, dim).
        """
        if depth == "linear":
            return LinearDecoder(self.grid, dim, self.latent_tokens, self.latent_channels)
        size = self.decoder_size
        return Decoder(
            self.grid,
            dim,
            self.latent_tokens,
            self.latent_channels,
            TransformerSize(size.width, depth, size.num_heads, size.mlp_ratio),
            positions=self.decoder_positions,
            rope_theta=self.rope_theta,
        )

    def latents_hash(self) -> str:
        """Hash of all that latents depend on: encoder and bottleneck, so a fine-tuned decoder does not change it."""
        description = f"{self.patch_size} {self.encoder_size} {self.encoder_positions} {type(self.bottleneck).__name__}"
        return weights_hash(description, (self.encoder.state_dict(), self.bottleneck.state_dict()))

    def encode_with_losses(self, images: Tensor, mask: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Return latents (B, L, C) and the bottleneck's named losses; for training. See :meth:`encode`."""
        return self.bottleneck(self.encoded_tokens(images, mask))

    def encoded_tokens(self, images: Tensor, mask: Tensor | None) -> Tensor:
        """Return what the bottleneck reads: (B, L, width)."""
        if mask is None:
            return self.encoder(images)
        expected = (images.shape[0], math.prod(grid_of(images, self.patch_size)))
        if mask.shape != expected:
            raise ValueError(f"mask has shape {tuple(mask.shape)}, expected {expected}")
        if self.mask_mode == "replace":
            return self.encoder(images, mask.to(images.device, non_blocking=True))
        return self.encoder(images, visible=visible_patches(mask, images.device))

    def encode(
        self, images: Tensor, mask: Tensor | None = None, sample: bool = False, rng: torch.Generator | None = None
    ) -> Tensor:
        """Encode images.

        Args:
            images: (B, 3, H, W) float in [-1, 1].
            mask: (B, N) bool, True = masked, none by default; a mask on the CPU avoids waiting for an accelerator.
            sample: draw from the posterior of a variational bottleneck instead of taking its mean.
            rng: random generator on the images' device for ``sample``; torch's global one by default.

        Returns:
            Raw latents (B, L, C).

        Raises:
            ValueError: if the image is not divisible into patches or the mask does not fit it.
        """
        if sample:
            return self.bottleneck.draw(self.encoded_tokens(images, mask), rng)
        return self.encode_with_losses(images, mask)[0]

    def decode(self, latents: Tensor, size: int | tuple[int, int] | None = None) -> Tensor:
        """Decode latents to pixels; values are not clamped.

        Args:
            latents: (B, L, C).
            size: (height, width) or side of the wanted images; the training resolution if not given.

        Returns:
            (B, 3, H, W), about [-1, 1].

        Raises:
            ValueError: if ``latents`` or ``size`` do not fit this tokenizer.
        """
        grid = self.grid if size is None else patch_grid(size, self.patch_size)
        return unpatchify(self.decoder(latents, grid), grid)

    def forward(self, images: Tensor) -> Tensor:
        """Reconstruct images at their own size: (B, 3, H, W) -> (B, 3, H, W)."""
        return self.decode(self.encode(images), (images.shape[2], images.shape[3]))

    @classmethod
    def from_pretrained(cls, path_or_repo: str | Path, **overrides: Any) -> "Tokenizer":
        """Load a published tokenizer (config.json + model.safetensors); see :func:`load_tokenizer`."""
        return load_tokenizer(path_or_repo, **overrides)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors in the published format; see :func:`save_tokenizer`."""
        save_tokenizer(self, folder)


def load_tokenizer(path_or_repo: str | Path, **overrides: Any) -> Tokenizer:
    """Build a published tokenizer and load its weights strictly.

    Args:
        path_or_repo: local folder or hub id.
        **overrides: ``embed_dim``, ``depth``, ``num_heads`` (for encoder and decoder alike) where the backbone's name
            in config.json does not give the true size, or any key of config.json.

    Returns:
        The tokenizer in evaluation mode, float32, on CPU.

    Raises:
        FileNotFoundError: if a file is missing.
        TypeError: for an override that is neither a size nor a key of config.json.
        ValueError: for a truncated file, another kind of model, missing, unknown or misshapen tensors.
    """
    folder = locate(path_or_repo)
    config = read_config(folder / "config.json", REQUIRED_KEYS, "tokenizer")
    for key, value in overrides.items():
        if key in SIZE_OVERRIDES:
            config |= {f"encoder_{key}": value, f"decoder_{key}": value}
        elif key in config:
            config[key] = value
        else:
            raise TypeError(
                f"unknown override {key!r}: neither a size ({', '.join(SIZE_OVERRIDES)}) nor in config.json"
            )
    tokenizer = Tokenizer(**tokenizer_arguments(config))
    load_published_state(tokenizer, read_tensors(folder / "model.safetensors"), str(folder))
    tokenizer.published_config = config
    return tokenizer.eval()


def save_tokenizer(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Write a tokenizer in the published format; one that was loaded from it comes out bit for bit.

    Parts that the published model always has and ours may lack are written with neutral values (a zero position
    table), so the written model computes the same.

    Raises:
        ValueError: if the bottleneck is not plain, the image is not square, or only one of encoder and decoder has
            rotary embeddings: the format has no place for these.
    """
    if not isinstance(tokenizer.bottleneck, PlainBottleneck):
        raise ValueError(f"the published format holds plain autoencoders, not {type(tokenizer.bottleneck).__name__}")
    if (tokenizer.encoder.rope is None) != (tokenizer.decoder.rope is None):
        raise ValueError("the published format holds rotary embeddings in both encoder and decoder, or in neither")
    if tokenizer.image_size[0] != tokenizer.image_size[1]:
        raise ValueError(f"the published format holds square image sizes, not {tokenizer.image_size}")
    tensors = {to_published_name(name): tensor for name, tensor in tokenizer.state_dict().items()}
    for name in ("encoder.freqs", "decoder.freqs"):
        if name in tensors:
            tensors[name] = tensors[name].flatten(2)
    tensors |= tokenizer.published_unused or unused_tensors(tokenizer)
    write_folder(folder, tensors, tokenizer.published_config or published_config(tokenizer))
