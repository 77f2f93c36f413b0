"""The few collective operations that losses need; without a process group they do nothing."""

import torch.distributed as dist
from torch import Tensor


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """Mean of a tensor over all processes, without gradient; the tensor itself when there is one process."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return tensor.detach()
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()
