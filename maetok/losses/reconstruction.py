"""Pixel and perceptual reconstruction losses. Images are (B, 3, H, W) in [-1, 1]; results are float32 scalars."""

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maetok.runtime.pretrained import Normalization, UnregisteredModule, channels_first, create_size_free_model
from maetok.runtime.weights import weights_hash


def pixel_loss(reconstructions: Tensor, images: Tensor, norm: Literal["l1", "l2"] = "l2") -> Tensor:
    """Return the mean absolute (``l1``) or squared (``l2``) error over all pixels, a float32 scalar."""
    difference = reconstructions.float() - images.float()
    return difference.abs().mean() if norm == "l1" else difference.square().mean()


class PerceptualLoss(nn.Module, ABC):
    """Distance of two image batches in the features of a frozen network, which is not part of the state dict."""

    @abstractmethod
    def forward(self, reconstructions: Tensor, images: Tensor) -> Tensor:
        """(B, 3, H, W) twice, in [-1, 1] -> scalar; gradients reach ``reconstructions``."""


class LPIPSLoss(PerceptualLoss):
    """LPIPS (Zhang et al. 2018) of torchmetrics on a backbone with torchvision's weights.

    Args:
        net_type: backbone; the paper uses ``vgg``.
        checkpoint_path: torchvision's file with the backbone's weights. Without it torchvision reads its cache or
            downloads the file.
        pretrained: use torchvision's weights; false for random weights.

    Raises:
        RuntimeError: if torchvision's weights cannot be loaded.
    """

    def __init__(
        self,
        net_type: Literal["vgg", "alex", "squeeze"] = "vgg",
        checkpoint_path: str = "",
        pretrained: bool = True,
    ) -> None:
        super().__init__()
        from torchmetrics.functional.image.lpips import _LPIPS

        try:
            network = _LPIPS(net=net_type, pnet_rand=bool(checkpoint_path) or not pretrained)
            if checkpoint_path:
                weights = torch.load(checkpoint_path, map_location="cpu", weights_only=True)
                # the backbone keeps the numbers of torchvision's layers, in consecutive slices
                names = {name: re.sub(r"^slices?\.?\d+\.", "features.", name) for name in network.net.state_dict()}
                network.net.load_state_dict({name: weights[theirs] for name, theirs in names.items()})
        except (OSError, KeyError) as error:
            raise RuntimeError(
                f"cannot load torchvision's weights for LPIPS with net_type={net_type!r}, "
                f"checkpoint_path={checkpoint_path!r}: {error}. Put the file into $TORCH_HOME/hub/checkpoints on a "
                "machine with network access, set checkpoint_path to it, or use TimmPerceptualLoss."
            ) from error
        self.network, self.net_type = UnregisteredModule(network), net_type

    @property
    def digest(self) -> str:
        """Return a hash of the weights, in hexadecimal."""
        return weights_hash(f"LPIPS {self.net_type}", [self.network.network.state_dict()])

    def forward(self, reconstructions: Tensor, images: Tensor) -> Tensor:
        """Return the mean LPIPS distance. Pixels out of range are not clamped, so they keep their gradient."""
        return self.per_image(reconstructions, images).mean()

    def per_image(self, reconstructions: Tensor, images: Tensor) -> Tensor:
        """(B, 3, H, W) twice, in [-1, 1] -> LPIPS distances (B,)."""
        return self.network(reconstructions.float(), images.float()).flatten()


class TimmPerceptualLoss(PerceptualLoss):
    """Squared distance of unit-normalised feature maps of any timm model, averaged over several depths.

    Args:
        model_name: timm name of a model that supports ``features_only``.
        pretrained: load timm's weights (needs network access once).
        checkpoint_path: load weights from a local file instead.
        stages: numbers of the feature stages to compare; all by default.
    """

    def __init__(
        self,
        model_name: str,
        pretrained: bool = False,
        checkpoint_path: str = "",
        stages: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        options = {"out_indices": tuple(stages)} if stages is not None else {}
        model = create_size_free_model(model_name, pretrained, checkpoint_path, features_only=True, **options)
        self.channels = model.feature_info.channels()
        self.network = UnregisteredModule(nn.Sequential(Normalization(model), model))

    def forward(self, reconstructions: Tensor, images: Tensor) -> Tensor:
        """Return the mean squared distance between unit feature vectors, averaged over depths."""
        with torch.no_grad():
            wanted = self.unit_features(images)
        found = self.unit_features(reconstructions)
        return torch.stack([(a - b).square().sum(1).mean() for a, b in zip(found, wanted, strict=True)]).mean()

    def unit_features(self, images: Tensor) -> list[Tensor]:
        """Return one map (B, channels, h, w) per depth, of unit length along the channels."""
        maps = zip(self.network(images), self.channels, strict=True)
        return [F.normalize(channels_first(features.float(), channels), dim=1) for features, channels in maps]
