"""Build a small task of stage 1, its data and its trainer."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_modules import CosineWithWarmup, TokenizerTraining
from lightning_modules.optimization import Optimization
from maetok import Tokenizer
from maetok.losses import LossWeights, ReconstructionObjective
from maetok.networks import HOGTarget, PatchGAN, PlainBottleneck, TransformerSize

SIZE = TransformerSize(16, 1, 2)


class Noise(IterableDataset):
    """Yields endless batches of images; the number of a batch decides its images."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        number = 0
        while True:
            images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(number)) * 2 - 1
            yield {
                "images": images,
                "labels": torch.zeros(4, dtype=torch.long),
                "valid": torch.ones(4, dtype=torch.bool),
            }
            number += 1


class CountingDiscriminator(PatchGAN):
    """Records its calls."""

    def __init__(self) -> None:
        super().__init__(channels=4, layers=1)
        self.calls: list[tuple[int, bool]] = []

    def forward(self, images: Tensor) -> Tensor:
        trains = any(parameter.requires_grad for parameter in self.parameters())
        self.calls.append((len(images), trains))
        return super().forward(images)


def optimization(rate: float = 1e-2, clip: float = 1.0) -> Optimization:
    return Optimization(partial(torch.optim.AdamW, lr=rate), partial(CosineWithWarmup, warmup_steps=2), clip)


def task(start: int = 0, adversarial: float = 0.5, **options: Any) -> TokenizerTraining:
    torch.manual_seed(0)
    defaults: dict[str, Any] = {
        "tokenizer": Tokenizer(16, 8, 2, lambda width: PlainBottleneck(width, 4), SIZE, SIZE),
        "autoencoder_optimization": optimization(),
        "objective": ReconstructionObjective(LossWeights(1.0, 0.0, adversarial), discriminator_start=start),
        "targets": {"hog": HOGTarget},
        "target_weights": {"hog": 1.0},
        "discriminator": CountingDiscriminator,
        "discriminator_optimization": optimization(),
    }
    return TokenizerTraining(**(defaults | options))


def fit(model: TokenizerTraining, folder: Path, steps: int, *callbacks: Callback, **options: Any) -> Trainer:
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=list(callbacks),
        **options,
    )
    trainer.fit(model, DataLoader(Noise(), batch_size=None))
    return trainer
