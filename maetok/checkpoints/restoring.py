"""Load a checkpoint, file or folder, into sharded networks and optimizers; no process holds the whole."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from maetok.checkpoints.files import OPTIMIZERS, REST, WEIGHTS, Checkpoint, read_checkpoint, split, stored_tensors


def restore(path: Path, network: nn.Module, optimizers: Sequence[Optimizer]) -> Checkpoint:
    """Load weights and optimizer states; all processes must do this together.

    Args:
        path: checkpoint, written by any number of processes.
        network: all of its weights must be in the checkpoint, and no others.
        optimizers: the optimizers in the checkpoint's order; empty to load weights only.

    Returns:
        The rest of the checkpoint.

    Raises:
        RuntimeError: if weights are missing, unknown or of another shape.
        ValueError: if the checkpoint has another number of optimizers.
    """
    if path.is_dir():
        rest = torch.load(path / REST, map_location="cpu", weights_only=True)
        found: Mapping[str, Any] = stored_tensors(path)
        shapes = {name: (entry.size, entry.properties.dtype) for name, entry in found.items()}
    else:
        found, rest = split(read_checkpoint(path, mmap=True))
        shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in found.items()}
    weights = {f"{WEIGHTS}.{name}": tensor.detach() for name, tensor in network.state_dict().items()}
    stored = {name: shape for name, (shape, _) in shapes.items() if name.startswith(f"{WEIGHTS}.")}
    check_names(weights, {name: shape for name, shape in stored.items() if not is_copy(network, name)}, path)
    if optimizers and len(optimizers) != len(rest[OPTIMIZERS]):
        raise ValueError(f"{path} has {len(rest[OPTIMIZERS])} optimizers, but the task {len(optimizers)}")
    states = {}
    for number, optimizer in enumerate(optimizers):
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for name, (shape, dtype) in shapes.items():
            if name.startswith(f"{OPTIMIZERS}.{number}."):
                states[name] = state_like(parameters[int(name.split(".")[2])], shape, dtype)
    tensors = weights | states
    if path.is_dir():
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process reads alone
            dcp.load(tensors, storage_reader=dcp.FileSystemReader(path))
    else:
        for name, tensor in tensors.items():
            copy_share(found[name], tensor)
    for number, optimizer in enumerate(optimizers):
        load_optimizer(optimizer, number, states, rest[OPTIMIZERS][number])
    return rest


def restore_states(path: Path, network: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Load as :func:`restore` does, but keep the options of optimizers, such as the learning rate."""
    options = [
        [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
        for optimizer in optimizers
    ]
    restore(path, network, optimizers)
    for optimizer, kept in zip(optimizers, options, strict=True):
        for group, values in zip(optimizer.param_groups, kept, strict=True):
            group.update(values)


def is_copy(network: nn.Module, name: str) -> bool:
    """Return whether stored weights are an old checkpoint's second copy of weights that an average now shares."""
    name = name.removeprefix(f"{WEIGHTS}.")
    owners = ((prefix, owner) for prefix, owner in network.named_modules() if hasattr(owner, "is_shared"))
    return any(name.startswith(f"{prefix}.") and owner.is_shared(name[len(prefix) + 1 :]) for prefix, owner in owners)


def check_names(weights: Mapping[str, Tensor], stored: Mapping[str, Sequence[int]], path: Path) -> None:
    """Raise RuntimeError unless the checkpoint holds the weights of this network, naming the first that do not fit."""
    problems = [f"missing {name}" for name in weights if name not in stored]
    problems += [f"unknown {name}" for name in stored if name not in weights]
    problems += [
        f"size mismatch of {name}: {tuple(shape)} in the checkpoint, {tuple(weights[name].shape)} in the network"
        for name, shape in stored.items()
        if name in weights and tuple(shape) != tuple(weights[name].shape)
    ]
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise RuntimeError(f"{path} holds the weights of another network than the config describes: {shown}")


def state_like(parameter: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return an empty tensor for an optimizer's state: sharded like its parameter if the shapes agree, else whole."""
    if tuple(shape) == tuple(parameter.shape):
        return torch.zeros_like(parameter.detach(), dtype=dtype)
    return torch.zeros(tuple(shape), dtype=dtype)


def copy_share(source: Tensor, target: Tensor) -> None:
    """Copy a whole tensor, or this process's shard of it if the target is sharded."""
    if isinstance(target, DTensor):
        source = source.to(target.device)
        shared = distribute_tensor(source, target.device_mesh, target.placements, src_data_rank=None)
        target.to_local().copy_(shared.to_local())
    else:
        target.copy_(source)


def load_optimizer(optimizer: Optimizer, number: int, tensors: Mapping[str, Tensor], rest: dict[str, Any]) -> None:
    """Load the tensors, and the numbers stored beside them, into an optimizer."""
    state = {index: dict(values) for index, values in rest["state"].items()}
    for name, tensor in tensors.items():
        _, owner, index, key = name.split(".", 3)
        if int(owner) == number:
            state[int(index)][key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": rest["param_groups"]})
