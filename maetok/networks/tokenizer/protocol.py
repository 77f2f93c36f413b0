"""What the suite knows of a tokenizer: the contract of stages 2 and 3, latent encoding, sampling, callbacks and hub."""

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn


@runtime_checkable
class LatentTokenizer(Protocol):
    """Turns images into latents and back. An ``nn.Module`` with these members serves every stage of the suite.

    ``images`` are (B, 3, H, W) float in [-1, 1]; ``latents`` are (B, L, C), raw. A tokenizer whose latents form a grid
    hands them out in raster order and says so in ``latent_grid``.
    """

    image_size: tuple[int, int]
    """(height, width) of the images that it was trained on."""
    patch_size: int
    """Side in pixels of a patch that a mask covers, or the stride of a convolutional encoder."""
    latent_tokens: int
    """Number L of latent tokens at ``image_size``."""

    @property
    def latent_channels(self) -> int:
        """Channels C of a latent token."""

    @property
    def latent_grid(self) -> tuple[int, int] | None:
        """(rows, columns) of the latent tokens; None if they have no place in the image."""

    @property
    def latent_statistics(self) -> tuple[Tensor, Tensor] | None:
        """Mean and scale (C,) float32 that the tokenizer brings; None if they are to be measured on data."""

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
        """Return what a stage trains: 1 is the whole tokenizer, 2 the pixel decoder."""

    @property
    def last_layer(self) -> Tensor:
        """The weight that makes the pixels; the adaptive adversarial weight compares gradients at it."""

    def blocks(self) -> list[nn.Module]:
        """Return the modules that sharding, compiling, packing, checkpointing and planning act on."""
