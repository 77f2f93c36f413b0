"""Tasks whose pictures have known metrics, and shards for them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from PIL import Image
from torch import Tensor

from maetok.flow import index_noise
from tests.support.shards import write_tar

LEVELS = 51
"""Levels of 255 by which ``Darker`` darkens."""


class Darker(LightningModule):
    """Reconstructs an image in lower contrast, and darker by 51 levels."""

    checkpoint_step = 7

    def __init__(self, contrast: float = 1.0) -> None:
        super().__init__()
        self.contrast = contrast

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    test_step = validation_step

    def reconstruct(self, images: torch.Tensor) -> torch.Tensor:
        return images * self.contrast - LEVELS / 127.5


def write_bright_shards(folder: Path, counts: list[int]) -> None:
    """Write images of 16 x 16 without dark pixels, so that darkening does not clip."""
    folder.mkdir()
    rng, number = np.random.default_rng(0), 0
    for shard, count in enumerate(counts):
        members = []
        for _ in range(count):
            Image.fromarray(rng.integers(LEVELS, 256, (16, 16, 3), dtype=np.uint8)).save(folder / "x.png")
            members += [(f"{number}.png", (folder / "x.png").read_bytes()), (f"{number}.cls", b"0")]
            number += 1
        write_tar(folder / f"validation-{shard:06d}.tar", members)
    (folder / "x.png").unlink()


class Painter(LightningModule):
    """Draws noise by index, brighter for higher labels, and in higher contrast with guidance."""

    checkpoint_step = 7

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    test_step = validation_step

    def sample(self, labels: Tensor, indices: Tensor, guidance_scale: float | None = None) -> Tensor:
        noise = index_noise(3, indices, shape=(3, 8, 8)) * 0.2 * (guidance_scale or 2.0)
        return noise + labels[:, None, None, None] / 4 - 0.5
