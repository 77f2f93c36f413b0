"""What callbacks may ask of a task and of a datamodule."""

from typing import Any, Protocol

from torch import Tensor


class EncodesAndReconstructs(Protocol):
    """The methods of a task that callbacks use; images are (B, 3, H, W) float in [-1, 1]."""

    def encode(self, images: Tensor) -> Tensor:
        """Raw latents (B, L, C)."""
        ...

    def reconstruct(self, images: Tensor) -> Tensor:
        """Reconstructions, shaped like the images."""
        ...

    def views(self, images: Tensor) -> dict[str, Tensor]:
        """Named picture columns (B, 3, h, w) in [-1, 1]."""
        ...


class HasEvaluationLoaders(Protocol):
    """The method of a datamodule that callbacks use."""

    def evaluation_dataloader(self, split: str) -> Any:
        """Every sample of ``train`` or ``validation`` once, without augmentation."""
        ...
