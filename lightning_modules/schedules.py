"""Learning-rate schedules over optimizer steps, as factors of the optimizer's own rate; options of continued runs."""

import math

from lightning.pytorch.utilities import rank_zero_info
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class CosineWithWarmup(LambdaLR):
    """Linear rise over ``warmup_steps``, then half a cosine down to ``final_ratio`` at the last step.

    Args:
        optimizer: the optimizer.
        total_steps: steps of the whole training; given by the task.
        warmup_steps: steps of the rise.
        final_ratio: factor at the end.

    Raises:
        ValueError: if the training has no known end.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int, warmup_steps: int = 0, final_ratio: float = 0.0) -> None:
        if total_steps < 1:
            raise ValueError(
                f"a cosine schedule needs a known number of steps, got {total_steps}: set trainer.max_steps"
            )

        def factor(step: int) -> float:
            if step < warmup_steps:
                return (step + 1) / warmup_steps
            progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
            return final_ratio + (1.0 - final_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress))

        super().__init__(optimizer, factor)


class ConstantWithWarmup(LambdaLR):
    """Linear rise over ``warmup_steps``, then constant.

    Args:
        optimizer: the optimizer.
        total_steps: unused; every schedule is given it.
        warmup_steps: steps of the rise.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int, warmup_steps: int = 0) -> None:
        super().__init__(optimizer, lambda step: min(1.0, (step + 1) / max(1, warmup_steps)))


def apply_configured_options(optimizer: Optimizer, configured: Optimizer) -> None:
    """Give a restored optimizer the options of a new one, with the learning rate at the schedule's current factor."""
    for group, options in zip(optimizer.param_groups, configured.param_groups, strict=True):
        stored, rate = group["initial_lr"], options["initial_lr"]
        if stored != rate:
            rank_zero_info(f"the checkpoint's learning rate of {stored:g} becomes {rate:g}, as the config says")
            group["lr"] *= rate / stored if stored else 1.0
        group.update({name: value for name, value in options.items() if name not in ("params", "lr")})
