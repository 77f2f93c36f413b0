"""The collective operations that losses and metrics need; without a process group they do nothing."""

import atexit
import time
from typing import Any

import torch.distributed as dist
from torch import Tensor


def several_processes() -> bool:
    """Return whether there is a process group of more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """Return the mean of a tensor over all processes, without gradient; with one process the tensor itself."""
    if not several_processes():
        return tensor.detach()
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes, without gradient; with one process the tensor itself."""
    if not several_processes():
        return tensor.detach()
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total


def gather_over_ranks(value: Any) -> list[Any]:
    """Return the values of all processes in the order of ranks. Values are picklable and may differ in size."""
    if not several_processes():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def delay_exit_for_gloo(seconds: float = 0.5) -> None:
    """Delay the exit of this process.

    A thread of gloo that still holds a tensor of the last operation frees it under Python's lock. If Python is already
    shutting down, the process aborts ("terminate called without an active exception"), and a successful run looks as
    if it had failed.
    """
    atexit.register(time.sleep, seconds)
