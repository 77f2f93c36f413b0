"""Build small tasks of all three stages and train them under any strategy."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy, Strategy

from datamodules import Digits, Loading
from lightning_modules import ConstantWithWarmup, DecoderFinetuning, LatentDiffusion, TokenizerTraining
from lightning_modules.base import Task
from lightning_modules.optimization import Optimization
from maetok import SiT, Tokenizer
from maetok.losses import AdversarialLoss, DiffAugment, LossWeights, ReconstructionObjective
from maetok.networks import HOGTarget, MaskRatio, PatchGAN, PlainBottleneck, TransformerSize
from maetok.training.sharding import to_full_tensor, to_local_shard
from strategies import FSDP2Strategy

SIZE = TransformerSize(32, 2, 2)


def optimization(name: str, rate: float) -> Optimization:
    return Optimization(partial(getattr(torch.optim, name), lr=rate), partial(ConstantWithWarmup, warmup_steps=2), 0.5)


def tokenizer(**options: Any) -> Tokenizer:
    defaults = {"encoder": SIZE, "decoder": SIZE, "decoder_positions": "both"}
    return Tokenizer(32, 8, 4, partial(PlainBottleneck, channels=8), **(defaults | options))


def denoiser() -> SiT:
    """Return a denoiser with random weights: a new one returns zeros."""
    network = SiT(4, 8, 10, SIZE)
    for parameter in network.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return network


def build(stage: int, optimizer: str = "SGD", rate: float = 0.02, **options: Any) -> Task:
    """Build the task of a stage with discriminator, LeCAM, augmentation and two micro-batches a step."""
    torch.manual_seed(stage)
    trained = {"denoiser": denoiser()} if stage == 3 else {"tokenizer": tokenizer()}
    options = trained | options
    trained_by = "optimization" if stage == 3 else "autoencoder_optimization"
    common: dict[str, Any] = {trained_by: optimization(optimizer, rate), "accumulate_grad_batches": 2, "seed": 3}
    if stage == 3:
        return LatentDiffusion(
            tokenizer=tokenizer(), ema_decays=(0.5, 0.9), statistics_samples=40, **(common | options)
        )
    adversarial = AdversarialLoss(lecam_weight=0.01, lecam_decay=0.9, augment=DiffAugment())
    common |= {
        "objective": ReconstructionObjective(
            LossWeights(1.0, 0.0, 0.5), adversarial=adversarial, discriminator_start=1
        ),
        "discriminator": partial(PatchGAN, channels=4, layers=2),
        "discriminator_optimization": optimization(optimizer, rate),
        "ema_decay": 0.5,
    }
    if stage == 2:
        return DecoderFinetuning(init_from=None, **(common | options))
    targets: dict[str, Any] = {"targets": {"hog": partial(HOGTarget, cell_size=8)}, "target_weights": {"hog": 1.0}}
    return TokenizerTraining(mask_ratio=MaskRatio(0.2, 0.6), auxiliary_depth=1, **(targets | common | options))


def strategy_of(name: str) -> Strategy | str:
    """Return the strategy by overlay name and variant, such as ``fsdp-file``; ``single`` is one process."""
    if name == "ddp":
        return DDPStrategy(find_unused_parameters=True)
    if name.startswith("hsdp"):
        return FSDP2Strategy(replicate=2)
    return {"single": "auto", "fsdp-file": FSDP2Strategy(sharded_checkpoint=False)}.get(name, "fsdp2")


def fit(
    task: Task,
    folder: Path,
    digits: Path,
    strategy: str,
    world_size: int,
    steps: int,
    *callbacks: Callback,
    ckpt_path: str | None = None,
    **options: Any,
) -> Trainer:
    """Train on global micro-batches of eight."""
    data = Digits(str(digits), 32, batch_size=8, evaluation_batch_size=8, loading=Loading(num_workers=0), seed=0)
    defaults = {
        "accelerator": "cpu",
        "devices": world_size,
        "strategy": strategy_of(strategy),
        "max_steps": steps,
        "max_epochs": -1,
        "limit_val_batches": 0,
        "check_val_every_n_epoch": None,
        "logger": False,
        "enable_checkpointing": any(callback.__class__.__name__ == "ResumableCheckpoint" for callback in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": folder,
        "callbacks": list(callbacks),
    }
    trainer = Trainer(**(defaults | options))
    trainer.fit(task, datamodule=data, ckpt_path=ckpt_path)
    return trainer


def held_bytes(trainer: Trainer, task: Task) -> int:
    """Return the bytes of parameters, averages and optimizer states on this process, without frozen networks."""
    tensors = [to_local_shard(parameter) for parameter in task.parameters()]
    for optimizer in trainer.optimizers:
        tensors += [to_local_shard(value) for state in optimizer.state.values() for value in state.values()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def whole_state(task: Task) -> dict[str, torch.Tensor]:
    """Return all weights, gathered from all processes."""
    return {name: to_full_tensor(value).detach().clone() for name, value in task.state_dict().items()}
