"""Exponential moving average of a network's weights."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from maetok.training.sharding import reshard, to_local_shard


class EMA(nn.Module):
    """A copy of a network whose weights follow the original's by an exponential moving average.

    It is a submodule of its owner: it moves between devices with it and is in its checkpoints. Call ``ema.network`` to
    use it. It never trains. Modules that the original does not train are not copied: the average holds the same
    modules, and a state dict names their weights only once, under the original.

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
        shared = {id(module): module for module in frozen_modules(network)}
        self.network = copy.deepcopy(network, shared).requires_grad_(False).eval()
        self._shared = [name for name, module in self.network.named_modules(prefix="network") if id(module) in shared]
        self.register_state_dict_post_hook(_leave_out_shared)
        self.register_load_state_dict_pre_hook(_keep_shared)

    def train(self, mode: bool = True) -> "EMA":
        """Stay in evaluation mode for any ``mode``."""
        return super().train(False)

    def is_shared(self, name: str) -> bool:
        """Return whether a name of this module's state, such as ``network.encoder.weight``, is the original's."""
        return any(name.startswith(f"{shared}.") for shared in self._shared)

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """Move towards ``network`` after its ``step``-th optimizer step; buffers are copied.

        If both are sharded, and alike, every process moves its own share.
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        reshard(self.network)
        reshard(network)
        pairs = zip(self.network.parameters(), network.parameters(), strict=True)
        trained = [(average, value) for average, value in pairs if average is not value]
        averages: list[Tensor] = [to_local_shard(average) for average, _ in trained]
        torch._foreach_lerp_(averages, [to_local_shard(value) for _, value in trained], 1.0 - decay)
        for average, value in zip(self.network.buffers(), network.buffers(), strict=True):
            if average is not value:
                average.copy_(value)


def frozen_modules(network: nn.Module) -> Iterator[nn.Module]:
    """Yield the largest modules of a network that have parameters and train none of them."""
    trained = [parameter.requires_grad for parameter in network.parameters()]
    if trained and not any(trained):
        yield network
    elif trained:
        for child in network.children():
            yield from frozen_modules(child)


def _leave_out_shared(ema: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    assert isinstance(ema, EMA)
    for name in [name for name in state if name.startswith(prefix) and ema.is_shared(name.removeprefix(prefix))]:
        del state[name]


def _keep_shared(ema: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let shared modules load what they hold: their owner loads them, and old checkpoints have a second copy."""
    assert isinstance(ema, EMA)
    for name, module in ema.named_modules():
        if name in ema._shared:
            for key, value in module.state_dict(prefix=f"{prefix}{name}.", keep_vars=True).items():
                state[key] = value.detach()
