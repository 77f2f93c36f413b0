"""Frozen timm models as feature targets: DINOv2, SigLIP or anything else that timm knows."""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maetok.networks.patches import grid_of
from maetok.networks.targets import FeatureTarget
from maetok.pretrained import Frozen, Normalization, channels_first, create_size_free_model


class TimmFeatures(nn.Module):
    """Patch features of a timm model on the patch grid of the tokenizer.

    A vision transformer sees the image resized so that its own patches form the same grid (16 x 16 patches: 224 pixels
    for a model with 14-pixel patches); prefix tokens are dropped. The map of a convolutional model is resized.
    """

    def __init__(self, model: Any, patch_size: int) -> None:
        super().__init__()
        self.model: Any = model
        self.patch_size, self.normalize = patch_size, Normalization(model)
        is_transformer = hasattr(model, "num_prefix_tokens")
        self.teacher_patch = self.model.patch_embed.patch_size[0] if is_transformer else None

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, N, dim)."""
        grid = grid_of(images, self.patch_size)
        if self.teacher_patch:
            size = (grid[0] * self.teacher_patch, grid[1] * self.teacher_patch)
            if size != tuple(images.shape[-2:]):
                images = F.interpolate(images, size=size, mode="bicubic", antialias=True, align_corners=False)
            features = self.model.forward_features(self.normalize(images))
            return features[:, self.model.num_prefix_tokens :]
        features = channels_first(self.model.forward_features(self.normalize(images)), self.model.num_features)
        if features.shape[-2:] != grid:
            features = F.interpolate(features.float(), size=grid, mode="bilinear", align_corners=False)
        return features.flatten(2).transpose(1, 2)


class TimmTarget(FeatureTarget):
    """Patch features of a frozen timm model, e.g. DINOv2 or SigLIP (paper section 3.2).

    Args:
        patch_size: patch size of the tokenizer.
        model_name: timm name, e.g. ``vit_large_patch14_dinov2.lvd142m``.
        pretrained: load timm's weights (needs network access once).
        checkpoint_path: load weights from a local file instead.
        loss: how predictions are compared; the released code uses cosine similarity.
    """

    def __init__(
        self,
        patch_size: int,
        model_name: str,
        pretrained: bool = False,
        checkpoint_path: str = "",
        loss: Literal["mse", "cosine"] = "cosine",
    ) -> None:
        super().__init__()
        model = create_size_free_model(model_name, pretrained, checkpoint_path, num_classes=0)
        self.patch_size, self.loss, self.dim = patch_size, loss, model.num_features
        self.features = Frozen(TimmFeatures(model, patch_size))

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, N, dim) float32."""
        return self.features(images).float()

    def picture(self, features: Tensor, grid: tuple[int, int], reference: Tensor) -> Tensor:
        """The three leading principal components of the true features as colours, one pixel per patch, enlarged."""
        reference, features = (F.normalize(values.float(), dim=-1) for values in (reference, features))
        flat = reference.flatten(0, 1)
        mean = flat.mean(0)
        directions = torch.pca_lowrank(flat - mean, q=min(3, *flat.shape))[2]
        colours = (features - mean) @ directions
        spread = ((flat - mean) @ directions).std(0).clamp_min(1e-6)
        image = F.pad(colours / (2 * spread), (0, 3 - colours.shape[-1])).clamp(-1, 1)
        image = image.unflatten(1, grid).permute(0, 3, 1, 2)
        return F.interpolate(image, scale_factor=math.ceil(self.patch_size / 2), mode="nearest")
