"""Skips optimizer steps whose loss or gradient is not finite, on all processes together, without waiting for a GPU."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Adam, Optimizer

from maetok.runtime.distributed import mean_over_ranks


@dataclass
class Verdict:
    """Verdict on one optimizer's step, as tensors on the device of its loss: reading them waits for that device."""

    skipped: Tensor
    """() float32, the same on all processes: 1 if the step was skipped, 0 if it was taken."""
    loss: Tensor
    """() float32, mean over micro-batches and processes."""
    gradient_norm: Tensor
    """() float32, before clipping."""
    own_losses: Tensor
    """(micro-batches,) float32, the losses of this process."""


class StepGuard:
    """Judges the steps of the optimizers of one task.

    A step is skipped if the loss of any micro-batch on any process, or the gradient norm, is not finite. If the
    autoencoder step is skipped (optimizer 0), the discriminator step is skipped too, because it saw the same images. A
    bad discriminator step does not undo the autoencoder step. A skipped step changes no bit of parameters or optimizer
    state.
    """

    def __init__(self) -> None:
        self.verdicts: dict[int, Verdict] = {}
        """Verdicts of the last step by index of the optimizer."""
        self.losses: dict[int, list[Tensor]] = {}

    def note_loss(self, index: int, loss: Tensor) -> None:
        """Note the loss () of a micro-batch for the optimizer of that index."""
        self.losses.setdefault(index, []).append(loss.detach().float())

    def step(self, index: int, gradient_norm: Tensor, optimizer: Optimizer, step: Callable[[], Any]) -> None:
        """Call ``step``, which steps ``optimizer``, so that nothing changes if the step must be skipped.

        All processes call this together, for the same optimizers in the same order.
        """
        if index == 0:
            self.verdicts = {}
        self.verdicts[index] = self.judge(index, gradient_norm)
        step_unless(self.verdicts[index].skipped, optimizer, step)

    def judge(self, index: int, gradient_norm: Tensor) -> Verdict:
        """Return the verdict, on which processes agree by one all-reduce of two numbers."""
        own_losses, norm = torch.stack(self.losses.pop(index)), gradient_norm.detach().float()
        loss = own_losses.mean()
        bad = (~(loss.isfinite() & norm.isfinite())).float()
        if index and 0 in self.verdicts:
            bad = torch.maximum(bad, self.verdicts[0].skipped)
        share, mean_loss = mean_over_ranks(torch.stack((bad, loss))).unbind()
        return Verdict((share > 0).float(), mean_loss, norm, own_losses)


def step_unless(skipped: Tensor, optimizer: Optimizer, step: Callable[[], Any]) -> None:
    """Call ``step``, which steps ``optimizer``; if ``skipped`` () is 1, neither its parameters nor its state change.

    A fused Adam or AdamW reads ``skipped`` on its device, as it reads the overflow flag of ``torch.amp.GradScaler``.
    For other optimizers this process waits for the value, and skips by stepping without gradients. This includes fused
    SGD: with the flag set at its first step, its momentum would be uninitialised memory.
    """
    if isinstance(optimizer, Adam) and all(group["fused"] for group in optimizer.param_groups):
        optimizer.found_inf = skipped  # type: ignore[attr-defined]
        step()
        del optimizer.found_inf  # type: ignore[attr-defined]
        return
    if skipped.item():
        optimizer.zero_grad(set_to_none=True)
    step()


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Return whether all floating-point tensors are finite on all processes; each process checks its shards."""
    shards = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    finite = [shard.detach().isfinite().all() for shard in shards if shard.is_floating_point()]
    bad = ~torch.stack(finite).all()
    return not mean_over_ranks(bad.float()).item()
