"""The contract of a tokenizer, on which stages 2 and 3, latent encoding, sampling, callbacks and hub rely."""

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn


@runtime_checkable
class LatentTokenizer(Protocol):
    """Turns images into latents and back. An ``nn.Module`` with these members serves every stage of the suite.

    ``images`` are (B, 3, H, W) float in [-1, 1]; ``latents`` are (B, L, C), raw. If latents form a
    grid, they are in raster order and ``latent_grid`` gives its size.
    """

    image_size: tuple[int, int]
    """(height, width) of the training images."""
    patch_size: int
    """Side in pixels of a patch that a mask covers, or the stride of a convolutional encoder."""
    latent_tokens: int
    """Number L of latent tokens at ``image_size``."""

    @property
    def latent_channels(self) -> int:
        """Return the channels C of a latent token."""

    @property
    def latent_grid(self) -> tuple[int, int] | None:
        """Return (rows, columns) of the latent tokens; None if tokens have no place in the image."""

    @property
    def latent_statistics(self) -> tuple[Tensor, Tensor] | None:
        """Return mean and scale (C,) float32 that the tokenizer brings; None if they must be measured on data."""

    def encode(
        self, images: Tensor, mask: Tensor | None = None, sample: bool = False, rng: torch.Generator | None = None
    ) -> Tensor:
        """Return latents; ``mask`` (B, N) bool, True = masked; ``sample`` draws from the posterior with ``rng``."""

    def encode_with_losses(self, images: Tensor, mask: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Return latents and named, weighted scalar losses; for training."""

    def decode(self, latents: Tensor, size: int | tuple[int, int] | None = None) -> Tensor:
        """Return images of (height, width) ``size``, by default ``image_size``; values are not clamped."""

    def latents_hash(self) -> str:
        """Return a hash of everything that latents depend on; a fine-tuned decoder does not change it."""

    def trainable_parameters(self, stage: int) -> list[nn.Parameter]:
        """Return the parameters that a stage trains: 1 the whole tokenizer, 2 the pixel decoder."""

    @property
    def last_layer(self) -> Tensor:
        """Return the weight that produces the pixels; the adaptive adversarial weight compares gradients there."""

    def blocks(self) -> list[nn.Module]:
        """Return the modules that sharding, compiling, packing, checkpointing and planning act on."""
