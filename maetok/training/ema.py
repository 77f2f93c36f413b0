"""Exponential moving average of a network's weights."""

import copy

import torch
from torch import Tensor, nn

from maetok.training.sharding import reshard, to_local_shard


class EMA(nn.Module):
    """A copy of a network whose weights follow the original's by an exponential moving average.

    Being a submodule of its owner, it is in the checkpoint, moves between devices and is used by calling
    ``ema.network``. It never trains.

    Args:
        network: the network to follow.
        decay: share of the old average that an update keeps; the first updates keep less, (1 + n) / (10 + n).

    Raises:
        ValueError: unless 0 <= decay < 1.
    """

    def __init__(self, network: nn.Module, decay: float = 0.9999) -> None:
        super().__init__()
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"ema_decay={decay} is outside [0, 1)")
        self.decay = decay
        self.network = copy.deepcopy(network).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "EMA":
        """Stay in evaluation mode whatever is asked."""
        return super().train(False)

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """Move towards ``network`` after its ``step``-th optimizer step; buffers are copied.

        Of sharded networks, both alike, every process moves its own share.
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        reshard(self.network)
        reshard(network)
        averages: list[Tensor] = [to_local_shard(parameter) for parameter in self.network.parameters()]
        torch._foreach_lerp_(averages, [to_local_shard(parameter) for parameter in network.parameters()], 1.0 - decay)
        for average, value in zip(self.network.buffers(), network.buffers(), strict=True):
            average.copy_(value)
