"""Normalise latents to mean 0 and standard deviation 1 per channel, as denoisers take them, and undo it."""

import torch
from torch import Tensor, nn


class LatentNormalizer(nn.Module):
    """Shift and scale latents per channel. Mean and standard deviation are buffers, so checkpoints hold them.

    Args:
        channels: channels C of a latent. Latents do not change until :meth:`set_statistics` is called.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Set mean and standard deviation (C,) of the training latents.

        Raises:
            ValueError: if the number of channels differs, or a channel does not vary.
        """
        if mean.shape != self.mean.shape or std.shape != self.std.shape:
            raise ValueError(
                f"statistics of {tuple(mean.shape)} for latents of {tuple(self.mean.shape)}: set the denoiser's "
                "latent_channels to the tokenizer's"
            )
        if not bool((std > 0).all()):
            raise ValueError(
                f"latent channels {(std <= 0).nonzero().flatten().tolist()} do not vary: check the tokenizer's weights"
            )
        self.mean.copy_(mean)
        self.std.copy_(std)

    def normalize(self, latents: Tensor) -> Tensor:
        """Normalise raw latents (B, L, C)."""
        return (latents - self.mean) / self.std

    def denormalize(self, normalized: Tensor) -> Tensor:
        """Turn normalised latents (B, L, C) back into raw latents (B, L, C)."""
        return normalized * self.std + self.mean
