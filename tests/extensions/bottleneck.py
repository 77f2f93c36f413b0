"""A bottleneck from outside the package: bounded latents with a penalty on their energy."""

import torch
from torch import Tensor, nn

from maetok.networks import Bottleneck


class BoundedBottleneck(Bottleneck):
    """Project, bound to (-1, 1), and pay ``weight`` times the mean square."""

    def __init__(self, width: int, channels: int = 4, weight: float = 0.5) -> None:
        super().__init__()
        self.channels, self.weight = channels, weight
        self.projection = nn.Linear(width, channels)

    def forward(self, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return latents and the loss ``energy``."""
        latents = torch.tanh(self.projection(tokens).float())
        return latents, {"energy": self.weight * latents.square().mean()}
