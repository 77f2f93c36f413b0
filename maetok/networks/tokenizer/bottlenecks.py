"""Bottlenecks between encoder and decoder. One signature: tokens -> (latents, {name: scalar loss})."""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maetok.runtime.distributed import mean_over_ranks


class Bottleneck(nn.Module, ABC):
    """Turns encoder tokens (B, L, width) into latents (B, L, channels).

    It returns losses by name as weighted float32 scalars, which are added to the training loss.
    """

    channels: int

    @abstractmethod
    def forward(self, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return latents (B, L, channels) and named losses for tokens (B, L, width)."""

    def draw(self, tokens: Tensor, rng: torch.Generator | None = None) -> Tensor:
        """Return latents (B, L, channels) drawn from the posterior with ``rng``; the latents if there is none."""
        return self(tokens)[0]


class PlainBottleneck(Bottleneck):
    """A linear projection: the plain autoencoder (AE) that MAETok uses.

    Args:
        width: encoder width.
        channels: latent channels H of the paper.
    """

    def __init__(self, width: int, channels: int = 32) -> None:
        super().__init__()
        self.channels = channels
        self.projection = nn.Linear(width, channels)

    def forward(self, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Project; there is no loss."""
        return self.projection(tokens), {}


class KLBottleneck(Bottleneck):
    """Diagonal Gaussian posterior with a KL divergence to the unit Gaussian (VAE).

    Args:
        width: encoder width.
        channels: latent channels.
        weight: factor of the KL divergence, which is summed over tokens and channels and averaged over the batch.
        sample: draw from the posterior in training; false to return the mean. Evaluation always returns the mean.
    """

    def __init__(self, width: int, channels: int = 32, weight: float = 1e-6, sample: bool = True) -> None:
        super().__init__()
        self.channels, self.weight, self.sample = channels, weight, sample
        self.projection = nn.Linear(width, 2 * channels)

    def forward(self, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return mean or sample of the posterior, and the loss ``kl``."""
        mean, log_variance = self.posterior(tokens)
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).sum(dim=(1, 2)).mean()
        latents = mean
        if self.training and self.sample:
            latents = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
        return latents, {"kl": self.weight * divergence}

    def posterior(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log variance, both (B, L, channels) float32."""
        mean, log_variance = self.projection(tokens).float().chunk(2, dim=-1)
        return mean, log_variance.clamp(-30.0, 20.0)

    def draw(self, tokens: Tensor, rng: torch.Generator | None = None) -> Tensor:
        """Return latents drawn from the posterior, in training and in evaluation."""
        mean, log_variance = self.posterior(tokens)
        noise = torch.randn(mean.shape, generator=rng, device=mean.device)
        return mean + torch.exp(0.5 * log_variance) * noise


class SoftVQBottleneck(Bottleneck):
    """SoftVQ: a latent is the softmax-weighted average of codewords, so the quantiser stays differentiable.

    Args:
        width: encoder width.
        channels: latent channels.
        codebook_size: number of codewords.
        temperature: softmax temperature; near zero this is hard vector quantisation.
        entropy_weight: factor of (mean entropy of an assignment - entropy of the mean assignment); minimising it makes
            single assignments sharp and the use of the codebook even.
        l2_norm: compare unit vectors and average unit codewords.
    """

    def __init__(
        self,
        width: int,
        channels: int = 32,
        codebook_size: int = 8192,
        temperature: float = 0.07,
        entropy_weight: float = 0.01,
        l2_norm: bool = True,
    ) -> None:
        super().__init__()
        self.channels, self.temperature, self.entropy_weight, self.l2_norm = (
            channels,
            temperature,
            entropy_weight,
            l2_norm,
        )
        self.projection = nn.Linear(width, channels)
        self.codebook = nn.Parameter(torch.randn(codebook_size, channels) * channels**-0.5)

    def forward(self, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the soft assignment of every token, and the loss ``entropy``."""
        projected, codebook = self.projection(tokens).float(), self.codebook.float()
        with torch.autocast(tokens.device.type, enabled=False):  # a small temperature amplifies rounding
            return self.assign(projected, codebook)

    def assign(self, projected: Tensor, codebook: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Average codewords by their closeness to the projected tokens (B, L, C), all in float32."""
        if self.l2_norm:
            projected, codebook = F.normalize(projected, dim=-1), F.normalize(codebook, dim=-1)
        squared_distance = (
            projected.square().sum(-1, keepdim=True) - 2 * projected @ codebook.T + codebook.square().sum(-1)
        )
        log_assignment = (-squared_distance / self.temperature).log_softmax(dim=-1)
        assignment = log_assignment.exp()
        sample_entropy = -(assignment * log_assignment).sum(-1).mean()
        usage = assignment.flatten(0, 1).mean(0)
        if self.training:  # the value covers the whole batch, the gradient this process's part
            usage = usage + (mean_over_ranks(usage) - usage.detach())
        usage_entropy = -(usage * usage.clamp_min(1e-12).log()).sum()
        return assignment @ codebook, {"entropy": self.entropy_weight * (sample_entropy - usage_entropy)}
