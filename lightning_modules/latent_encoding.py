"""Encodes a data set with a trained tokenizer; ``callbacks.LatentWriter`` stores the results of ``predict``."""

from typing import Any

import torch
from torch import Tensor

from lightning_modules.base import Task
from maetok.checkpoints.runs import InitFrom
from maetok.networks import LatentTokenizer


class LatentEncoding(Task):
    """A frozen tokenizer, for ``predict`` and ``validate``.

    Args:
        tokenizer: the network; class_path ``maetok.Tokenizer.from_pretrained`` loads a published one.
        init_from: training checkpoint or run directory with its weights; null if the tokenizer brings them.
        mirrored: encode the horizontally mirrored image as a second variant of each sample.
    """

    def __init__(self, tokenizer: LatentTokenizer, init_from: InitFrom | None = None, mirrored: bool = True) -> None:
        super().__init__()
        if init_from is not None:
            init_from.load(tokenizer)
        self.tokenizer: Any = tokenizer.eval().requires_grad_(False)
        self.variants = ("original", "mirrored") if mirrored else ("original",)
        self.tokenizer_hash = tokenizer.latents_hash()

    def setup(self, stage: str) -> None:
        """Check precision and image size."""
        super().setup(stage)
        self.check_image_size(self.tokenizer.image_size)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) in [-1, 1] to latents (B, L, C)."""
        return self.tokenizer.encode(images)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents (B, L, C) to images (B, 3, H, W), about [-1, 1]."""
        return self.tokenizer.decode(latents)

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        """Reconstruct images; the result has the same shape."""
        return self.tokenizer.decode(self.tokenizer.encode(images), (images.shape[2], images.shape[3]))

    def views(self, images: Tensor) -> dict[str, Tensor]:
        """Return input and reconstruction."""
        return {"input": images, "reconstruction": self.reconstruct(images)}

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Do nothing: callbacks measure."""

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Do nothing, as in validation."""

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Return latents (n, V, L, C) float32 of the n valid samples of a batch in each of the V variants."""
        images = batch["images"][batch["valid"]]
        mirrored = [self.encode(images.flip(-1))] if "mirrored" in self.variants else []
        return torch.stack([self.encode(images), *mirrored], dim=1).float()
