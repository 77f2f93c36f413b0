"""Small tasks of stage 3, their data and their trainer."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from datamodules import LatentShards, Loading
from lightning_modules import ConstantWithWarmup, LatentDiffusion, LatentEncoding
from lightning_modules.optimization import Optimization
from maetok import SiT, Tokenizer
from maetok.networks import PlainBottleneck, TransformerSize
from tests.support.latents import write_cache
from tests.support.shards import write_shards

SIZE = TransformerSize(16, 1, 2)
CLASSES = 10


def tokenizer(seed: int = 1) -> Tokenizer:
    torch.manual_seed(seed)
    return Tokenizer(8, 4, 3, partial(PlainBottleneck, channels=4), SIZE, SIZE)


def denoiser(**options: Any) -> SiT:
    """Return a small denoiser with random weights; a new one predicts zero."""
    torch.manual_seed(3)
    network = SiT(**({"latent_tokens": 3, "latent_channels": 4, "num_classes": CLASSES, "size": SIZE} | options))
    for parameter in network.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    return network


def optimization(name: str = "AdamW", rate: float = 1e-2) -> Optimization:
    return Optimization(partial(getattr(torch.optim, name), lr=rate), partial(ConstantWithWarmup, warmup_steps=2))


def diffusion(**options: Any) -> LatentDiffusion:
    defaults = {"denoiser": denoiser(), "tokenizer": tokenizer(), "optimization": optimization(), "seed": 5}
    return LatentDiffusion(**(defaults | options))


def latent_shards(cache: Path, **options: Any) -> LatentShards:
    defaults = {"num_classes": CLASSES, "batch_size": 6, "loading": Loading(num_workers=0), "seed": 0}
    return LatentShards(str(cache), **(defaults | options))


def trainer(folder: Path, steps: int, *callbacks: Callback, **options: Any) -> Trainer:
    defaults = {
        "accelerator": "cpu",
        "max_steps": steps,
        "max_epochs": -1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": folder,
        "callbacks": list(callbacks),
    }
    return Trainer(**(defaults | options))


def diffusion_cache(folder: Path) -> Path:
    """Encode 20 training and 23 validation images, and their mirror images, with ``tokenizer()``; return the cache."""
    write_shards(folder / "shards", [7, 5, 8])
    write_shards(folder / "shards", [23], split="validation")
    write_cache(folder / "shards", folder / "cache", LatentEncoding(tokenizer()), dtype="float32")
    return folder / "cache"


class Recorder(Callback):
    """Records batch, state and loss of every step."""

    def __init__(self) -> None:
        self.batches: list[dict[str, Tensor]] = []
        self.states: list[dict[str, Tensor]] = []
        self.losses: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch)
        self.states.append({name: value.clone() for name, value in pl_module.state_dict().items()})

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self.losses.append(float(trainer.callback_metrics["train/loss"]))
