"""The base of all tasks: optimizer steps, checkpoints, and random numbers independent of the number of processes."""

import os
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from jsonargparse.typing import PositiveInt
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_modules.schedules import apply_configured_options
from maetok.checkpoints.building import own_class_path
from maetok.checkpoints.networks import NetworkRecord, write_records
from maetok.networks.inference import prepare_for_inference
from maetok.networks.layers.attention import CPU_HAS_BFLOAT16
from maetok.networks.layers.network import Network
from maetok.runtime.cpu import tune_cpu
from maetok.runtime.pretrained import frozen_networks
from maetok.training.ema import EMA
from maetok.training.sharding import (
    average_gradients,
    broadcast_from_first,
    gather,
    is_sharded,
    reshard,
    shard,
    to_full_tensor,
)
from maetok.training.step_guard import StepGuard


class Task(LightningModule):
    """Base of all tasks. Callbacks call only ``encode``, ``decode``, ``reconstruct``, ``views`` and ``sample``.

    They call them outside autocast, so callbacks measure in float32 in every training precision.

    A step is a step of the first optimizer. ``trainer.max_steps``, schedules, checkpoints and the axis of all logs
    count these steps. A step that the guard skips, because loss or gradient is not finite, counts too: schedules,
    noise, masks and the data order are functions of the step and continue. Weights and optimizer state do not change,
    and the moving average takes the same weights again. A skipped step does not delay the end of a run.

    Args:
        activation_checkpointing: recompute the activations of blocks in the backward pass to save memory.
        compile: compile blocks.
        accumulate_grad_batches: micro-batches per optimizer step.
        seed: seed of all noise, such as masks, times and augmentation; ``seed_everything`` if not given.
    """

    trains: ClassVar[dict[str, NetworkRecord]] = {}
    """Networks that the task trains, by argument name, with the places of their weights in its state dict."""

    def __init__(
        self,
        activation_checkpointing: bool = False,
        compile: bool = False,
        accumulate_grad_batches: PositiveInt = 1,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.configured_arguments: dict[str, Any] = {}  # init_args of the config; the command line sets them
        self.automatic_optimization = False
        self.activation_checkpointing, self.compile_blocks = activation_checkpointing, compile
        self.accumulate_grad_batches = accumulate_grad_batches
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", "0")) if seed is None else seed
        self.micro_step = 0  # micro-batches since the last optimizer step
        self.step_guard: StepGuard | None = None  # callbacks.NonFiniteGuard sets it
        self.checkpoint_step = 0  # step of the checkpoint that was loaded, for subcommands that do not train

    def encode(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) in [-1, 1] -> raw latents (B, L, C)."""
        raise NotImplementedError

    def decode(self, latents: Tensor) -> Tensor:
        """Decode raw latents (B, L, C) -> images (B, 3, H, W) at the training resolution, about [-1, 1]."""
        raise NotImplementedError

    def reconstruct(self, images: Tensor) -> Tensor:
        """Reconstruct images (B, 3, H, W) in [-1, 1]; the result has the same shape."""
        raise NotImplementedError

    def sample(self, condition: Any, indices: Tensor, guidance_scale: float | None = None) -> Tensor:
        """Sample images (n, 3, H, W) in [-1, 1] from a condition and sample indices (n,); diffusion only."""
        raise NotImplementedError

    def views(self, images: Tensor) -> dict[str, Tensor]:
        """Return named picture columns (B, 3, h, w) in [-1, 1] that show what the task does with these images."""
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        """Refuse precisions that break training, and warn of a precision that this machine can only emulate.

        Raises:
            ValueError: for 16-mixed, whose loss scaling two optimizers do not share, and for bfloat16 weights, whose
                moving average would not move.
        """
        precision = str(self.trainer.precision)
        if precision not in ("32-true", "bf16-mixed"):
            raise ValueError(f"trainer.precision={precision} is not supported: use bf16-mixed or 32-true")
        # The moving average is in evaluation mode on purpose.
        warnings.filterwarnings("ignore", r"Found \d+ module\(s\) in eval mode")
        if self.trainer.strategy.root_device.type != "cpu":
            return
        tune_cpu()
        if precision.startswith("bf16") and not CPU_HAS_BFLOAT16:
            rank_zero_warn(
                f"trainer.precision={precision}, but this CPU has no matrix instructions for bfloat16: "
                "32-true is many times faster here"
            )

    def configure_model(self) -> None:
        """Do nothing; training tasks shard their networks here. Sharding strategies require this method."""

    def prepare_training(self, network: Network, *also_compiled: Network) -> None:
        """Recompute activations and compile, as configured; shard the network and its averages if the strategy does.

        Only ``fit`` shards. Every process holds everything else whole, such as a discriminator or frozen networks, with
        the first process's values: where the trained network was built on the meta device, initialisation differs.
        """
        network.set_activation_checkpointing(self.activation_checkpointing)
        for compiled in (network, *also_compiled) if self.compile_blocks else ():
            compiled.compile_blocks()
        if self.device_mesh is None or self.trainer.state.fn != "fit" or is_sharded(network):
            return
        device = self.trainer.strategy.root_device
        shard(network, self.device_mesh, device, torch.bfloat16 if self.trainer.precision == "bf16-mixed" else None)
        for average in self.averages:
            shard(average.network, self.device_mesh, device, stays_gathered=True)
        for module in (self, *frozen_networks(self)):
            broadcast_from_first(module, device)

    @property
    def averages(self) -> list[EMA]:
        """Return all moving averages of this task."""
        return [module for module in self.modules() if isinstance(module, EMA)]

    def on_validation_start(self) -> None:
        """Gather sharded averages, so that each process can run them independently in evaluation."""
        for average in self.averages:
            gather(average)

    def on_validation_end(self) -> None:
        """Free the gathered weights."""
        for average in self.averages:
            reshard(average)

    on_test_start, on_test_end = on_validation_start, on_validation_end
    on_predict_start, on_predict_end = on_validation_start, on_validation_end

    def on_predict_epoch_start(self) -> None:
        """Make networks faster for prediction; results change only by rounding."""
        bfloat16 = self.trainer.precision == "bf16-mixed"
        self.undo_preparation = [prepare_for_inference(it, bfloat16) for it in (self, *frozen_networks(self))]

    def on_predict_epoch_end(self) -> None:
        """Restore the networks' weights."""
        for undo in self.undo_preparation:
            undo()
        self.undo_preparation = []

    def check_image_size(self, own_size: tuple[int, int]) -> None:
        """Raise ValueError unless the configs of data and tokenizer agree on the image size."""
        data_size = getattr(getattr(self.trainer, "datamodule", None), "image_size", None)
        if data_size is not None and tuple(data_size) != own_size:
            raise ValueError(
                f"data.init_args.image_size={tuple(data_size)} but "
                f"model.init_args.tokenizer.init_args.image_size={own_size}: set both to one size"
            )

    def check_classes(self, own_classes: int | None) -> None:
        """Raise ValueError unless data and a denoiser with classes (not None) agree on their number."""
        classes = getattr(getattr(self.trainer, "datamodule", None), "num_classes", own_classes)
        if own_classes is not None and classes != own_classes:
            raise ValueError(
                f"data.init_args.num_classes={classes}, but model.init_args.denoiser.init_args.num_classes="
                f"{own_classes}: set both to one number"
            )

    def on_train_start(self) -> None:
        """Apply the options of the config to optimizers that a checkpoint has restored with its own options."""
        optimizers, schedules = self.configure_optimizers()  # type: ignore[misc]
        for optimizer, configured in zip(self.trainer.optimizers, optimizers, strict=True):
            apply_configured_options(optimizer, configured)
        for current, configured in zip(self.trainer.lr_scheduler_configs, schedules, strict=True):
            current.scheduler.base_lrs = configured.base_lrs  # type: ignore[union-attr]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Record the trained networks, so that a checkpoint tells how to build them and where their weights are."""
        records = {}
        for name, record in self.trains.items():
            described = self.configured_arguments.get(name) or {}
            class_path = described.get("class_path") or own_class_path(self.get_submodule(record.raw.rstrip(".")))
            init_args = described.get("init_args", {}) if described else None
            records[name] = replace(record, class_path=class_path, init_args=init_args)
        write_records(checkpoint, records)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Remember the step of the weights."""
        self.checkpoint_step = checkpoint["global_step"]

    def begin_micro_step(self) -> np.random.SeedSequence:
        """Seed torch's global generators for this micro-batch and process, and return the seed shared by all processes.

        All noise is a function of (seed, step, micro-batch, process), so a continued run repeats an uninterrupted one.
        """
        shared = [self.seed, self.global_step, self.micro_step]
        rank_seed = np.random.SeedSequence([*shared, 1 + self.global_rank]).generate_state(1, np.uint64)[0]
        torch.manual_seed(int(rank_seed >> np.uint64(1)))
        return np.random.SeedSequence([*shared, 0])

    def end_micro_step(self) -> None:
        """Count the micro-batch."""
        self.micro_step = 0 if self.is_last_micro_step else self.micro_step + 1

    @property
    def step_kind(self) -> str:
        """Return the kind of the next training step; kinds differ in their number of operations."""
        return "every step"

    @property
    def is_last_micro_step(self) -> bool:
        """Return whether the optimizers step after this micro-batch."""
        return self.micro_step + 1 == self.accumulate_grad_batches

    def uniform(self, rng: np.random.Generator, samples: int, *shape: int) -> Tensor:
        """Return the numbers of :meth:`uniform_on_host` on this process's device."""
        own = self.uniform_on_host(rng, samples, *shape)
        own = own.pin_memory() if self.device.type == "cuda" else own  # a pageable copy would wait for the GPU
        return own.to(self.device, non_blocking=True)

    def uniform_on_host(self, rng: np.random.Generator, samples: int, *shape: int) -> Tensor:
        """Draw uniform numbers in [0, 1), float32 (samples, *shape), one row per sample of this process.

        The rows of all processes are drawn together and distributed like the samples, so a sample gets the same numbers
        on any number of processes.
        """
        rows = rng.random((samples * self.trainer.world_size, *shape), dtype=np.float32)
        return torch.from_numpy(rows[self.global_rank :: self.trainer.world_size].copy())

    def backward_micro_batch(self, index: int, loss: Tensor) -> None:
        """Add this micro-batch's share of the gradient of ``loss`` () for the optimizer of that index.

        Processes average gradients only in the last micro-batch before a step.
        """
        if self.step_guard is not None:
            self.step_guard.note_loss(index, loss)
        with nullcontext() if self.is_last_micro_step else self.local_gradients():
            self.manual_backward(loss / self.accumulate_grad_batches)

    def local_gradients(self) -> AbstractContextManager[None]:
        """Return a context in which processes do not average gradients."""
        strategy = self.trainer.strategy
        return strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) else nullcontext()

    def step_optimizer(self, index: int, network: nn.Module, gradient_clip: float) -> Tensor:
        """Clip, step the optimizer of that index unless the guard skips it, step its schedule, and clear gradients.

        Only optimizer 0, the autoencoder's or the denoiser's, advances Lightning's step counter.

        Returns:
            The gradient norm before clipping, a scalar.
        """
        optimizer = self.optimizers(use_pl_optimizer=index == 0)
        optimizer = optimizer[index] if isinstance(optimizer, list) else optimizer
        if self.device_mesh is not None and not is_sharded(network):
            average_gradients(network.parameters())
        parameters = [parameter for parameter in network.parameters() if parameter.grad is not None]
        norm = to_full_tensor(nn.utils.clip_grad_norm_(parameters, gradient_clip or float("inf"), foreach=True))
        if self.step_guard is None:
            optimizer.step()
        else:
            self.step_guard.step(index, norm, self.trainer.optimizers[index], optimizer.step)
        optimizer.zero_grad(set_to_none=True)
        self.trainer.lr_scheduler_configs[index].scheduler.step()
        return norm

    def learning_rate(self, index: int) -> float:
        """Return the current learning rate of the optimizer of that index."""
        return self.trainer.optimizers[index].param_groups[0]["lr"]

    def log_scalars(self, scalars: dict[str, Tensor | float]) -> None:
        """Log training scalars against the number of training steps.

        Lightning would copy a number to the GPU and wait for the copy, so numbers become tensors on the CPU.
        """
        scalars = scalars | {"step": float(self.global_step)}
        self.log_dict({name: torch.as_tensor(value) for name, value in scalars.items()})

    def on_validation_epoch_end(self) -> None:
        """Put validation scalars on the same axis as training scalars."""
        if not self.trainer.sanity_checking:
            self.log("step", float(self.global_step or self.checkpoint_step))

    on_test_epoch_end = on_validation_epoch_end
