"""Discriminators: image (B, 3, H, W) in [-1, 1] -> logits (B, K), K scores per image."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from maetok.networks.layers.network import Network
from maetok.runtime.pretrained import Normalization, UnregisteredModule, create_size_free_model


class DINOHead(nn.Module):
    """Small spectral-norm convolution head on one map of frozen features: (B, D, h, w) -> (B, h * w) logits.

    Args:
        dim: feature channels D.
        kernel_size: side of the residual convolution, odd.
    """

    def __init__(self, dim: int, kernel_size: int = 3) -> None:
        super().__init__()
        self.enter = spectral_norm(nn.Conv2d(dim, dim, 1))
        self.enter_norm = nn.GroupNorm(1, dim)
        padding = kernel_size // 2
        self.residual = spectral_norm(nn.Conv2d(dim, dim, kernel_size, padding=padding, padding_mode="circular"))
        self.residual_norm = nn.GroupNorm(1, dim)
        self.judge = spectral_norm(nn.Conv2d(dim, 1, 1))

    def forward(self, features: Tensor) -> Tensor:
        """Score a map: (B, D, h, w) -> (B, h * w)."""
        hidden = F.leaky_relu(self.enter_norm(self.enter(features)), 0.2)
        update = F.leaky_relu(self.residual_norm(self.residual(hidden)), 0.2)
        return self.judge((hidden + update) * 0.5**0.5).flatten(1)


class DINODiscriminator(Network):
    """Frozen features of a timm vision transformer at several depths, each scored by a trained head.

    The backbone is an :class:`UnregisteredModule`: checkpoints and optimizers hold the heads only. Every
    normalisation is per sample, so the result does not depend on the number of processes.

    Args:
        model_name: timm name; the paper's table says DINOv2-S, the released code uses DINO ViT-S/16.
        pretrained: load timm's weights (needs network access once).
        checkpoint_path: load weights from a local file instead.
        layers: indices of the blocks whose features are scored.
        image_size: images are resized to this square; a multiple of the backbone's patch size.
        kernel_size: side of the residual convolution of a head.

    Raises:
        ValueError: if ``image_size`` is not a multiple of the backbone's patch size.
    """

    def __init__(
        self,
        model_name: str = "vit_small_patch16_224.dino",
        pretrained: bool = False,
        checkpoint_path: str = "",
        layers: Sequence[int] = (2, 5, 8, 11),
        image_size: int = 224,
        kernel_size: int = 3,
    ) -> None:
        super().__init__()
        model = create_size_free_model(model_name, pretrained, checkpoint_path, num_classes=0)
        patch = model.patch_embed.patch_size[0]
        if image_size % patch:
            raise ValueError(
                f"discriminator image_size={image_size} is not a multiple of {model_name}'s patch size {patch}"
            )
        self.layers, self.image_size = list(layers), image_size
        self.backbone = UnregisteredModule(BackboneMaps(model, self.layers))
        self.heads = nn.ModuleList(DINOHead(model.embed_dim, kernel_size) for _ in self.layers)

    def blocks(self) -> list[nn.Module]:
        """Return the heads."""
        return list(self.heads)

    def forward(self, images: Tensor) -> Tensor:
        """Score images (B, 3, H, W) in [-1, 1] -> logits (B, K) of all depths and positions; gradients reach images."""
        if images.shape[-2:] != (self.image_size, self.image_size):
            size = (self.image_size, self.image_size)
            images = F.interpolate(images.float(), size=size, mode="bicubic", antialias=True, align_corners=False)
        maps = self.backbone(images)
        return torch.cat([head(features) for head, features in zip(self.heads, maps, strict=True)], dim=1).float()


class BackboneMaps(nn.Module):
    """Normalise images for a timm vision transformer and return the maps (B, D, h, w) after the given blocks."""

    def __init__(self, model: Any, layers: list[int]) -> None:
        super().__init__()
        self.model: Any = model
        self.layers, self.normalize = layers, Normalization(model)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map images (B, 3, H, W) in [-1, 1] to one map per layer."""
        return self.model.forward_intermediates(
            self.normalize(images), indices=self.layers, norm=False, intermediates_only=True, stop_early=True
        )


class PatchGAN(Network):
    """Fully convolutional discriminator that scores overlapping patches (pix2pix), with spectral norm.

    Args:
        channels: width of the first layer, doubled per layer up to eight times.
        layers: number of strided layers; 3 sees patches of 70 pixels.
    """

    def __init__(self, channels: int = 64, layers: int = 3) -> None:
        super().__init__()
        widths = [3] + [channels * min(2**depth, 8) for depth in range(layers + 1)]
        stages: list[nn.Module] = []
        for depth, (inputs, outputs) in enumerate(pairwise(widths)):
            stride = 2 if depth < layers else 1
            stages += [spectral_norm(nn.Conv2d(inputs, outputs, 4, stride=stride, padding=1)), nn.LeakyReLU(0.2)]
        stages.append(spectral_norm(nn.Conv2d(widths[-1], 1, 4, padding=1)))
        self.stages = nn.Sequential(*stages)

    def blocks(self) -> list[nn.Module]:
        """Return the convolutions."""
        return [stage for stage in self.stages if isinstance(stage, nn.Conv2d)]

    def forward(self, images: Tensor) -> Tensor:
        """Score images (B, 3, H, W) in [-1, 1] -> logits (B, K), one per patch."""
        return self.stages(images).flatten(1).float()
