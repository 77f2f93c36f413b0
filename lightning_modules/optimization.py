"""How networks are optimised."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


@dataclass
class Optimization:
    """How one network is optimised.

    ``schedule`` is called with the optimizer and the number of its steps; ``gradient_clip`` limits the global norm of
    the gradient, 0 turns it off.
    """

    optimizer: Callable[[Iterable], Optimizer]
    schedule: Callable[[Optimizer, int], LRScheduler]
    gradient_clip: float = 1.0

    def build(self, network: nn.Module, total_steps: int) -> tuple[Optimizer, LRScheduler]:
        """Build optimizer and schedule over the trainable parameters of ``network``."""
        optimizer = self.optimizer([parameter for parameter in network.parameters() if parameter.requires_grad])
        return optimizer, self.schedule(optimizer, total_steps)
