"""Latents with mean 0 and standard deviation 1 per channel, which denoisers are trained on, and back."""

import torch
from torch import Tensor, nn


class LatentNormalizer(nn.Module):
    """Shifts and scales latents per channel; the statistics are buffers, so they are saved with the model.

    Args:
        channels: channels C of a latent. Until :meth:`set_statistics` is called, nothing is changed.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Take over mean and standard deviation (C,) of the training latents.

        Raises:
            ValueError: if they have another number of channels, or a channel does not vary.
        """
        if mean.shape != self.mean.shape or std.shape != self.std.shape:
            raise ValueError(
                f"statistics of {tuple(mean.shape)} for latents of {tuple(self.mean.shape)}: is the denoiser's "
                "latent_channels that of the tokenizer?"
            )
        if not bool((std > 0).all()):
            raise ValueError(
                f"latent channels {(std <= 0).nonzero().flatten().tolist()} do not vary: a broken tokenizer?"
            )
        self.mean.copy_(mean)
        self.std.copy_(std)

    def normalize(self, latents: Tensor) -> Tensor:
        """Raw (B, L, C) -> normalized (B, L, C)."""
        return (latents - self.mean) / self.std

    def denormalize(self, normalized: Tensor) -> Tensor:
        """Normalized (B, L, C) -> raw (B, L, C)."""
        return normalized * self.std + self.mean
