"""A discriminator from outside the package: one logit, linear in the mean colour."""

from torch import Tensor, nn


class ColourDiscriminator(nn.Module):
    """Judge an image by its mean colour."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.judge = nn.Linear(channels, 1)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> logits (B, 1)."""
        return self.judge(images.mean((2, 3)))
