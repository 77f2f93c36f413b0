"""Small latent caches of known content, written by the real callback."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from callbacks import LatentWriter
from tests.support.shards import image_shards


class MeanColours(LightningModule):
    """Encodes an image as the mean colours (4, 3) of its quarters, times a factor."""

    def __init__(self, tokenizer_hash: str = "a" * 64, mirrored: bool = True, factor: float = 1.0) -> None:
        super().__init__()
        self.tokenizer_hash, self.factor = tokenizer_hash, factor
        self.variants = ("original", "mirrored") if mirrored else ("original",)

    def encode(self, images: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(images, 2).flatten(2).transpose(1, 2) * self.factor

    def predict_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        images = batch["images"][batch["valid"]]
        return torch.stack(
            [self.encode(images.flip(-1) if mirror else images) for mirror in range(len(self.variants))], 1
        )


def write_cache(
    shards: Path,
    cache: Path,
    module: LightningModule | None = None,
    trainer: dict[str, Any] | None = None,
    **options: Any,
) -> None:
    """Predict over the shards of a folder."""
    defaults = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "use_distributed_sampler": False}
    defaults["default_root_dir"] = str(cache.parent)
    Trainer(**(defaults | (trainer or {})), callbacks=[LatentWriter(str(cache), **options)]).predict(
        module or MeanColours(), image_shards(shards, stage=None, max_fault_rate=0.2), return_predictions=False
    )
