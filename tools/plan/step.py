"""Live bytes and FLOPs of a training step, measured on fake tensors, which have shapes but no memory.

The task's own ``training_step`` runs, forward and backward, with all its networks, losses and the discriminator. The
device is called ``cpu``, since torch without CUDA cannot run backward on fake GPU tensors; attention uses the
fused kernel as on a GPU. Autocast follows the CPU's rules, which differ from the GPU's in a few elementwise operations.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_modules.autoencoder import AutoencoderTask
from lightning_modules.base import Task
from maetok.networks.layers import attention, rope
from maetok.networks.targets import hog
from maetok.networks.tokenizer import tokenizer
from maetok.runtime.flops import FlopCounter
from maetok.runtime.pretrained import frozen_networks
from tools.plan.state import trained_networks

aten = torch.ops.aten


@dataclass(frozen=True)
class StepCost:
    """Cost of one micro-batch on one process, without its state."""

    saved: int
    """Bytes alive when the autoencoder's backward pass begins: activations, bfloat16 copies of weights, inputs and
    losses."""
    peak: int
    """Largest number of bytes at any moment of the step, temporary tensors included."""
    weight_copies: int
    """Bytes of the main network's weights copied to autocast's dtype, which FSDP2 gathers instead; part of both numbers
    above."""
    flops: int
    """Floating-point operations of matrix products, convolutions and attention, including recomputation in backward
    passes; one multiply-add counts as two."""


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of tensors that are allocated while it is active and not yet freed.

    Args:
        weights: parameters whose copies in another dtype are also counted separately.
    """

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        self.live, self.peak, self.copies = 0, 0, 0
        self.weights = {weight.untyped_storage()._cdata for weight in weights}
        self.known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count the tensors that it allocates."""
        result = func(*args, **(kwargs or {}))
        inputs = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and (key := leaf.untyped_storage()._cdata) not in inputs:
                self.add(leaf.untyped_storage(), key)
                if func is aten._to_copy.default and inputs & self.weights:
                    self.copies += leaf.untyped_storage().nbytes()
        self.peak = max(self.peak, self.live)
        return result

    def add(self, storage: torch.UntypedStorage, key: int) -> None:
        """Count a storage until it is freed."""
        if key in self.known:
            return
        size = storage.nbytes()
        self.live += size
        self.known[key] = weakref.ref(storage, lambda _: self.remove(key, size))

    def remove(self, key: int, size: int) -> None:
        """Stop counting a freed storage."""
        self.live -= size
        self.known.pop(key, None)


def fake_copy(network: nn.Module) -> None:
    """Replace parameters and buffers, on the meta device for example, by fake ones; only inside a FakeTensorMode."""
    replaced: dict[Tensor, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if tensor not in replaced:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            replaced[tensor] = (
                nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
            )
        return replaced[tensor]

    for module in network.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = fake(tensor)


def with_real_tensors(holder: Any, name: str) -> Any:
    """Return a patch that lets a function of a module or class use real tensors inside a FakeTensorMode."""
    function = getattr(holder, name)

    def real(*arguments: Any) -> Any:
        with unset_fake_temporarily():
            return function(*arguments)

    return mock.patch.object(holder, name, real)


@contextlib.contextmanager
def fake_step(task: Task) -> Iterator[None]:
    """Make the networks of a task fake, with attention and rotation as on a GPU. No fake tensor stays in a cache.

    Masks are real, because the length of a sequence without its masked patches depends on their values.
    """
    caches = (hog.gaussian_window, hog.sobel_kernels)
    for cache in caches:
        cache.cache_clear()
    try:
        with (
            FakeTensorMode(allow_non_fake_inputs=True),
            mock.patch.object(attention, "plain_is_faster", return_value=False),
            mock.patch.object(rope, "complex_is_faster", lambda _, dtype: dtype == torch.float32),
            with_real_tensors(AutoencoderTask, "draw_mask"),
            with_real_tensors(tokenizer, "visible_patches"),
        ):
            for network in (task, *frozen_networks(task)):
                fake_copy(network)
            task._device = torch.device("cpu")  # Lightning remembers the device on which the task was built
            yield
    finally:
        for cache in caches:
            cache.cache_clear()


def run_step(
    task: Task, batch: dict[str, Tensor], precision: str, at_backward: Callable[[], None] = lambda: None
) -> None:
    """Run ``training_step`` on a batch without a trainer and keep the gradients; the discriminator is active.

    Args:
        task: its networks are on the CPU, fake or real.
        batch: batch of this process.
        precision: ``trainer.precision`` of the config.
        at_backward: called before each backward pass.
    """

    def backward(loss: Tensor, *_: Any, **__: Any) -> None:
        at_backward()
        loss.backward()

    start = getattr(getattr(task, "objective", None), "discriminator_start", 0)
    task.trainer = SimpleNamespace(
        world_size=1, global_rank=0, global_step=start, max_steps=2 * start + 2, training=True, strategy=None
    )
    replaced = {
        "manual_backward": backward,
        "step_optimizer": lambda *_: torch.zeros(()),
        "learning_rate": lambda _: 0.0,
        "log_scalars": lambda _: None,
        "training_noise": torch.randn_like,
    }
    for name, function in replaced.items():
        setattr(task, name, function)
    try:
        task.train()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            task.training_step(batch, 0)
    finally:
        for name in replaced:
            delattr(task, name)


def measure_step(task: Task, batch: Callable[[], dict[str, Tensor]], precision: str) -> StepCost:
    """Measure live bytes and FLOPs of a step: on fake tensors inside :func:`fake_step`, else on real tensors.

    Gradients exist before, as in the later micro-batches of an accumulated step, and do not count.
    """
    for parameter in task.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    copied = [p for trained in trained_networks(task) if trained.sharded for p in trained.network.parameters()]
    memory, saved = LiveMemory(copied), []
    with FlopCounter() as counter, memory:
        run_step(task, batch(), precision, lambda: saved.append(memory.live))
    return StepCost(saved[0], memory.peak, memory.copies, counter.flops + counter.recomputed)
