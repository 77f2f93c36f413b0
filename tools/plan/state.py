"""Bytes of training state per process: parameters, gradients, optimizer and moving averages, replicated or sharded.

    expected_bytes([Trained("denoiser", denoiser, AdamW, averages=1)], world_size=2, strategy="fsdp").total

The numbers come from tensors without memory (fake tensors). The optimizer's number is the size of its state after a
step on them, so no optimizer needs a formula.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer

from lightning_modules import LatentDiffusion
from lightning_modules.autoencoder import AutoencoderTask
from lightning_modules.base import Task
from maetok.networks.layers.network import Network
from maetok.training.ema import frozen_modules
from maetok.training.sharding import divided_dimension

Strategy = Literal["ddp", "fsdp", "hsdp"]
"""Replicate all networks; shard trained networks over all processes; shard them within each node."""


@dataclass(frozen=True)
class Trained:
    """A network that is trained.

    Args:
        name: for tables.
        network: parameters that require gradients are trained; all parameters are sharded, buffers are not.
        optimizer: builds its optimizer from a list of parameters.
        averages: number of its moving averages.
        sharded: whether ``fsdp`` and ``hsdp`` shard it; discriminators are replicated.
    """

    name: str
    network: Network
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer]
    averages: int = 0
    sharded: bool = True


@dataclass(frozen=True)
class StateBytes:
    """Bytes on one process; buffers count as parameters."""

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    averages: int = 0

    @property
    def total(self) -> int:
        """The sum of all kinds."""
        return sum(getattr(self, field.name) for field in fields(self))

    def __add__(self, other: "StateBytes") -> "StateBytes":
        return StateBytes(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


def trained_networks(task: Task) -> list[Trained]:
    """Return the networks that a task trains.

    Raises:
        ValueError: if it trains nothing.
    """
    if isinstance(task, AutoencoderTask):
        found = [Trained("autoencoder", task.model, task.autoencoder_optimization.optimizer, averages=1)]
        if task.discriminator is not None and task.discriminator_optimization is not None:
            optimizer = task.discriminator_optimization.optimizer
            found.append(Trained("discriminator", task.discriminator, optimizer, sharded=False))
        return found
    if isinstance(task, LatentDiffusion) and task.optimization is not None:
        return [Trained("denoiser", task.denoiser, task.optimization.optimizer, averages=len(task.emas))]
    raise ValueError(f"{type(task).__name__} trains nothing that could be planned: give the config of a `fit`")


def expected_bytes(
    networks: Sequence[Trained], world_size: int, strategy: Strategy, nodes: int = 1, rank: int = 0
) -> StateBytes:
    """Return the bytes of training state that one process holds between backward pass and optimizer step.

    Args:
        networks: the trained networks.
        world_size: number of processes.
        strategy: how networks are distributed.
        nodes: number of nodes; only ``hsdp`` uses it.
        rank: rank of the process; the first has the largest shards.

    Raises:
        ValueError: if ``world_size`` is not divisible by ``nodes``.
    """
    if world_size % nodes:
        raise ValueError(f"world_size={world_size} is not divisible by nodes={nodes}")
    shards = {"ddp": 1, "fsdp": world_size, "hsdp": world_size // nodes}[strategy]
    total = StateBytes()
    for trained in networks:
        total += network_bytes(trained, shards if trained.sharded else 1, rank)
    return total


def network_bytes(trained: Trained, shards: int, rank: int) -> StateBytes:
    """Return the bytes of one network, with its parameters divided into ``shards`` as in training."""
    parameters = list(trained.network.parameters())
    buffers = sum(size_of(buffer) for buffer in trained.network.buffers())
    frozen = list(frozen_modules(trained.network))  # a moving average shares them
    shared = {id(tensor) for module in frozen for tensor in (*module.parameters(), *module.buffers())}
    with FakeTensorMode():
        local = [nn.Parameter(shard_of(p, shards, rank), requires_grad=p.requires_grad) for p in parameters]
        weights = sum(size_of(parameter) for parameter in local) + buffers
        averaged = sum(size_of(own) for own, whole in zip(local, parameters, strict=True) if id(whole) not in shared)
        averaged += sum(size_of(buffer) for buffer in trained.network.buffers() if id(buffer) not in shared)
        trainable = [parameter for parameter in local if parameter.requires_grad]
        optimizer = trained.optimizer(trainable)
        for parameter in trainable:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        gradients = sum(size_of(parameter) for parameter in trainable)
        states = sum(
            size_of(value)
            for state in optimizer.state.values()
            for value in state.values()
            if isinstance(value, Tensor)
        )
    return StateBytes(weights, gradients, states, trained.averages * averaged)


def shard_of(parameter: Tensor, shards: int, rank: int) -> Tensor:
    """Return an empty tensor with the shape of the shard of a parameter on process ``rank % shards``."""
    shape = list(parameter.shape)
    if shards > 1:
        dimension = divided_dimension(shape, shards)
        rows = math.ceil(shape[dimension] / shards)
        shape[dimension] = min(rows, max(0, shape[dimension] - rows * (rank % shards)))
    return torch.empty(shape, dtype=parameter.dtype)


def size_of(tensor: Tensor) -> int:
    """Return the bytes of the elements of a tensor."""
    return tensor.numel() * tensor.element_size()
