"""A family of tokenizers from outside the package: a convolutional autoencoder whose latents form a grid."""

import torch
from torch import Tensor, nn

from maetok.networks import Network
from maetok.runtime.weights import weights_hash


class ConvolutionalBlock(nn.Module):
    """A residual 3 x 3 convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, width, h, w) -> the same shape."""
        return hidden + torch.relu(self.convolution(hidden))


class ConvolutionalTokenizer(Network):
    """Downsample by ``stride``; a masked patch is grey, and latents are in raster order."""

    def __init__(self, image_size: int = 32, stride: int = 8, channels: int = 4, width: int = 8) -> None:
        super().__init__()
        self.image_size, self.patch_size = (image_size, image_size), stride
        rows = image_size // stride
        self.latent_grid: tuple[int, int] | None = (rows, rows)
        self.latent_tokens, self.latent_channels = rows * rows, channels
        self.latent_statistics: tuple[Tensor, Tensor] | None = None
        self.encoder = nn.Sequential(
            nn.Conv2d(3, width, stride, stride), ConvolutionalBlock(width), nn.Conv2d(width, channels, 1)
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(channels, width, 1), ConvolutionalBlock(width), nn.ConvTranspose2d(width, 3, stride, stride)
        )

    def encode_with_losses(self, images: Tensor, mask: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Return latents (B, L, C) and no losses."""
        if mask is not None:
            rows, columns = (side // self.patch_size for side in images.shape[2:])
            hidden = mask.to(images.device).unflatten(1, (rows, columns))
            hidden = hidden.repeat_interleave(self.patch_size, 1).repeat_interleave(self.patch_size, 2)
            images = images.masked_fill(hidden[:, None], 0.0)
        return self.encoder(images).flatten(2).transpose(1, 2), {}

    def encode(
        self, images: Tensor, mask: Tensor | None = None, sample: bool = False, rng: torch.Generator | None = None
    ) -> Tensor:
        """Return latents (B, L, C)."""
        return self.encode_with_losses(images, mask)[0]

    def decode(self, latents: Tensor, size: int | tuple[int, int] | None = None) -> Tensor:
        """Return images (B, 3, H, W)."""
        height, width = self.image_size if size is None else (size, size) if isinstance(size, int) else size
        grid = (height // self.patch_size, width // self.patch_size)
        return self.decoder(latents.transpose(1, 2).unflatten(2, grid))

    def latents_hash(self) -> str:
        """Return a hash of the encoder."""
        return weights_hash("convolutional", [self.encoder.state_dict()])

    def trainable_parameters(self, stage: int) -> list[nn.Parameter]:
        """Return everything in stage 1, the decoder in stage 2."""
        return list((self if stage == 1 else self.decoder).parameters())

    @property
    def last_layer(self) -> Tensor:
        """Weight of the transposed convolution that makes the pixels."""
        return self.decoder[-1].weight

    def blocks(self) -> list[nn.Module]:
        """Return the residual blocks."""
        return [self.encoder[1], self.decoder[1]]

    def parts(self) -> list[nn.Module]:
        """Return encoder and decoder."""
        return [self.encoder, self.decoder]
