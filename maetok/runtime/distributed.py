"""The few collective operations that losses and metrics need; without a process group they do nothing."""

import atexit
import time
from typing import Any

import torch.distributed as dist
from torch import Tensor


def several_processes() -> bool:
    """Whether there is a process group of more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """Mean of a tensor over all processes, without gradient; the tensor itself when there is one process."""
    if not several_processes():
        return tensor.detach()
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Sum of a tensor over all processes, without gradient; the tensor itself when there is one process."""
    if not several_processes():
        return tensor.detach()
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total


def gather_over_ranks(value: Any) -> list[Any]:
    """What each process holds, in the order of ranks; any picklable value, of another size on each."""
    if not several_processes():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def delay_exit_for_gloo(seconds: float = 0.5) -> None:
    """Have this process wait a moment before it ends.

    A thread of gloo that still holds a tensor of the last operation frees it under Python's lock. If Python is shutting
    down by then, that aborts the process ("terminate called without an active exception"), and a run that has ended
    well looks as if it had failed.
    """
    atexit.register(time.sleep, seconds)
