"""A denoiser from outside the package, with blocks of its own: an MLP mixer whose channels the condition scales."""

from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from maetok.networks import Denoiser


class MixerBlock(nn.Module):
    """Mix tokens, then channels; the condition scales what enters."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.scale = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.across_tokens = nn.Linear(tokens, tokens)
        self.across_channels = Mlp(width, 4 * width)

    def forward(self, tokens: Tensor, embedded: Tensor) -> Tensor:
        """(B, L, width), embedded condition (B, width) -> (B, L, width)."""
        hidden = self.norm(tokens) * (1 + self.scale(embedded)[:, None])
        tokens = tokens + self.across_tokens(hidden.transpose(1, 2)).transpose(1, 2)
        return tokens + self.across_channels(self.norm(tokens))


class Frequencies(nn.Module):
    """Learned frequencies of time, in float32; their doubles are cached."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.frequencies = nn.Parameter(torch.randn(width))
        self.caching, self.cached = True, None

    def stop_caching(self) -> None:
        """Compute them anew from now on."""
        self.caching = False

    def forward(self, t: Tensor) -> Tensor:
        """t (B,) -> (B, width)."""
        if self.cached is None or not self.caching or torch.is_grad_enabled():
            self.cached = 2 * self.frequencies
        return torch.sin(t.float()[:, None] * self.cached)


class MixerDenoiser(Denoiser):
    """Blocks lie under a name of their own, so that only ``blocks()`` tells them."""

    def __init__(
        self,
        latent_tokens: int = 3,
        latent_channels: int = 4,
        num_classes: int | None = 10,
        width: int = 16,
        depth: int = 3,
    ) -> None:
        super().__init__(latent_tokens, latent_channels, num_classes)
        self.input = nn.Linear(latent_channels, width)
        self.time = Frequencies(width)
        self.classes = nn.Embedding(num_classes + 1, width) if num_classes else None
        self.layers = nn.ModuleList(MixerBlock(latent_tokens, width) for _ in range(depth))
        self.output = nn.Linear(width, latent_channels)

    def blocks(self) -> list[nn.Module]:
        """Return the mixer blocks."""
        return list(self.layers)

    def float32_modules(self) -> list[nn.Module]:
        """Return the frequencies."""
        return [self.time]

    def forward(self, x: Tensor, t: Tensor, condition: Any = None) -> Tensor:
        """Predict the velocity (B, L, C)."""
        embedded = self.time(t)
        if self.classes is not None:
            embedded = embedded + self.classes(condition)
        tokens = self.input(x)
        for layer in self.layers:
            tokens = layer(tokens, embedded.to(tokens.dtype))
        return self.output(tokens).to(x.dtype)


class SummaryDenoiser(MixerDenoiser):
    """Conditioned on something that the package does not know: the mean latent, in a dict; zeros are "no condition"."""

    has_null_condition = True

    def __init__(self) -> None:
        super().__init__(num_classes=None)
        self.summary = nn.Linear(4, 4)

    def condition_of(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the mean latent (B, C)."""
        return {"summary": batch["latents"].mean(1)}

    def drop_condition(self, condition: dict[str, Tensor], uniform: Tensor, probability: float) -> dict[str, Tensor]:
        """Set it to zero where ``uniform < probability``."""
        return {"summary": condition["summary"] * (uniform >= probability)[:, None]}

    def without_condition(self, condition: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return zeros."""
        return {"summary": torch.zeros_like(condition["summary"])}

    def forward(self, x: Tensor, t: Tensor, condition: Any = None) -> Tensor:
        """Predict the velocity (B, L, C)."""
        return super().forward(x, t) + self.summary(condition["summary"])[:, None]
