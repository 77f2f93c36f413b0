"""Train the same task under several strategies and switches; ``test_equality`` runs this and reads its files."""

import os
import sys
from contextlib import nullcontext
from functools import partialmethod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from torch import nn
from torch._dynamo.utils import counters

from maetok.networks import TransformerSize
from maetok.networks.layers import network
from maetok.runtime.distributed import gather_over_ranks
from tests.support.processes import run_group
from tests.support.strategies.runs import build, denoiser, fit, tokenizer, whole_state

STEPS = 3


class Communication(Callback):
    """Counts the reductions of sharded gradients in each micro-batch, and records the norms of whole gradients."""

    def __init__(self) -> None:
        self.reductions, self.gradients, self.calls = [], [], 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Count calls from now on."""
        original = dist.reduce_scatter_single

        def counted(*arguments: Any, **options: Any) -> Any:
            self.calls += 1
            return original(*arguments, **options)

        dist.reduce_scatter_single = counted

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Record this micro-batch; after the first of a step, gradients are added up but not averaged."""
        self.reductions.append(self.calls)
        self.calls = 0
        gradients = [parameter.grad for parameter in pl_module.parameters() if parameter.grad is not None]
        self.gradients += gather_over_ranks([float(gradient.norm()) for gradient in gradients])


def count_calls_under_checkpointing() -> list[int]:
    """Return a list whose sum becomes the number of calls of blocks under checkpointing, recomputation included."""
    calls: list[int] = []
    original = network.checkpoint

    def counting(run: Any, *arguments: Any, **options: Any) -> Any:
        def counted(*inputs: Any) -> Any:
            calls.append(1)
            return run(*inputs)

        return original(counted, *arguments, **options)

    network.checkpoint = counting
    return calls


def train(folder: Path, digits: Path, name: str, stage: int, strategy: str, world_size: int, options: Any) -> None:
    """Train; the first process saves a ``Result`` of ``test_equality``."""
    nn.Module.compile = partialmethod(nn.Module.compile, backend="aot_eager")  # type: ignore[method-assign]
    precision, other = options.pop("precision", "32-true"), options.pop("other", "")
    elsewhere = os.environ.get("RANK") == "1"
    if other == "meta":  # the second process builds the trained network without memory
        part, make = ("denoiser", denoiser) if stage == 3 else ("tokenizer", tokenizer)
        torch.manual_seed(stage)
        with torch.device("meta") if elsewhere else nullcontext():
            options[part] = make()
    if other == "drop":
        torch.manual_seed(stage)
        one_block = TransformerSize(32, 1, 2)  # compiling takes most of the time
        options["tokenizer"] = tokenizer(mask_mode="drop", encoder=one_block, decoder=one_block)
    task = build(stage, **options)
    if other == "seed" and elsewhere:  # as if the second process had another seed
        with torch.no_grad():
            for parameter in task.parameters():
                parameter.add_(1.0)
    counter, calls = Communication(), count_calls_under_checkpointing()
    counters.clear()
    trainer = fit(task, folder, digits, strategy, world_size, STEPS, counter, precision=precision)
    states = [state for optimizer in trainer.optimizers for state in optimizer.state.values()]
    held = [*task.parameters(), *(value for state in states for value in state.values())]
    norms = {name: value for name, value in trainer.callback_metrics.items() if name.startswith("gradient_norm")}
    state = whole_state(task)
    if trainer.is_global_zero:
        dtypes = {str(tensor.dtype) for tensor in held if tensor is not None}
        mesh = () if task.device_mesh is None else tuple(task.device_mesh.shape)
        switches = {"mesh": mesh, "checkpointed": sum(calls), "graphs": counters["stats"]["unique_graphs"]}
        torch.save((state, norms, dtypes, counter.reductions, counter.gradients, switches), folder / f"{name}.pt")


def runs(folder: Path, digits: Path) -> None:
    """Run all trainings, one after another."""

    def run(name: str, world_size: int, stage: int, strategy: str, **options: Any) -> None:
        run_group(world_size, train, folder, digits, name, stage, strategy, world_size, options)

    switches = {"activation_checkpointing": True, "compile": True}
    for stage in (1, 2, 3):
        run(f"{stage}-single", 1, stage, "single")
        run(f"{stage}-ddp", 2, stage, "ddp")
        run(f"{stage}-fsdp", 2, stage, "fsdp", other="seed" if stage == 1 else "meta")
    for strategy, world_size in (("single", 1), ("ddp", 2), ("fsdp", 2)):
        run(f"drop-{strategy}", world_size, 1, strategy, other="drop", **(switches if strategy == "fsdp" else {}))
    run("1-hsdp", 2, 1, "hsdp", other="meta")
    for stage in (1, 3):  # compiling takes long: in stage 1 the run that drops patches does it
        run(f"{stage}-switches", 2, stage, "fsdp", **(switches if stage == 3 else {"activation_checkpointing": True}))
        run(f"{stage}-bf16", 2, stage, "fsdp", precision="bf16-mixed")


if __name__ == "__main__":
    runs(Path(sys.argv[1]), Path(sys.argv[2]))
