"""Predict what a training needs on GPUs: ``python -m tools.plan --config FILE --nodes N --gpus-per-node G``.

Prints memory per GPU, bytes sent per step and an estimated step time for DDP, FSDP2 and hybrid sharding, each without
and with activation checkpointing. It needs no GPU: networks are built from the real config without memory and
without pretrained weights; nothing is downloaded. docs/planning.md explains the numbers and how they are checked.
"""

import argparse
import contextlib
import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
import yaml
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningArgumentParser
from torch import Tensor, nn

from lightning_modules.base import Task
from maetok.runtime.pretrained import frozen_networks
from main import main as command_line
from tools.plan.state import Strategy, Trained, expected_bytes, size_of, trained_networks
from tools.plan.step import StepCost, fake_step, measure_step
from tools.plan.time import MACHINES, Cluster, step_time, transfers

GIBIBYTE = 2**30
WEIGHTS = {"pretrained": False, "checkpoint_path": "", "init_from": None, "denoiser_from": None, "guide_from": None}
"""Config keys that name weights, and their values without weights."""
RESERVE = 0.1
"""Share of the GPU's memory for the CUDA context, library workspaces and fragmentation."""


@dataclass(frozen=True)
class Plan:
    """The part of a plan that does not depend on the number of nodes."""

    networks: list[Trained]
    frozen: list[nn.Module]
    costs: dict[bool, StepCost]
    """Cost of one micro-batch, without and with activation checkpointing."""
    precision: str
    samples: int
    """Samples per micro-batch and GPU."""
    micro_batches: int

    @property
    def parameter_bytes(self) -> int:
        """Return the bytes of a parameter in the dtype of the computation."""
        return 2 if self.precision == "bf16-mixed" else 4


def read_config(arguments: Sequence[str]) -> dict[str, Any]:
    """Return the config of ``main.py fit`` with these arguments, defaults included."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        command_line(["fit", *arguments, "--print_config"])
    if not text.getvalue():
        raise SystemExit(2)  # the command line has printed the error
    return yaml.safe_load(text.getvalue())


def without_weights(node: Any) -> Any:
    """Return a config whose networks need no files and no downloads."""
    if isinstance(node, dict):
        return {key: WEIGHTS[key] if key in WEIGHTS else without_weights(value) for key, value in node.items()}
    return [without_weights(value) for value in node] if isinstance(node, list) else node


def build_task(config: dict[str, Any], activation_checkpointing: bool) -> Task:
    """Build the task of a config on the meta device, without compiling, which changes no size."""
    model = without_weights(config["model"])
    model["init_args"] |= {"activation_checkpointing": activation_checkpointing, "compile": False}
    parser = LightningArgumentParser()
    parser.add_lightning_class_args(LightningModule, "model", subclass_mode=True)
    with torch.device("meta"):
        task = parser.instantiate(parser.parse_object({"model": model})).model
    task.configure_model()
    return task


def batch_maker(task: Task, data: dict[str, Any], samples: int) -> Callable[[], dict[str, Tensor]]:
    """Return a function that makes a batch of one process, as the datamodule would."""
    if "cache" in data:
        denoiser: Any = task.denoiser
        name, shape = "latents", (denoiser.latent_tokens, denoiser.latent_channels)
    else:
        size = data["image_size"]
        name, shape = "images", (3, *((size, size) if isinstance(size, int) else size))
    return lambda: {name: torch.empty(samples, *shape), "labels": torch.zeros(samples, dtype=torch.long)}


def make_plan(config: dict[str, Any], world_size: int) -> Plan:
    """Build the networks and run a step of each kind on fake tensors.

    Raises:
        ValueError: if the batch size is not divisible by the number of GPUs.
    """
    data, precision = config["data"]["init_args"], str(config["trainer"]["precision"])
    if data["batch_size"] % world_size:
        raise ValueError(f"data.init_args.batch_size={data['batch_size']} is not divisible by {world_size} GPUs")
    samples, costs = data["batch_size"] // world_size, {}
    for checkpointing in (False, True):
        task = build_task(config, checkpointing)
        with fake_step(task):
            costs[checkpointing] = measure_step(task, batch_maker(task, data, samples), precision)
    return Plan(trained_networks(task), frozen_networks(task), costs, precision, samples, task.accumulate_grad_batches)


def gathered_bytes(networks: Sequence[Trained], parameter_bytes: int) -> int:
    """Return the most bytes that FSDP2 holds besides shards: all outside blocks, two blocks, gradients of one block.

    The second block is prefetched. Gradients exist in the dtype of the computation and, for the reduction, in float32.
    """
    total = 0
    for trained in networks:
        if trained.sharded:
            blocks = [count(block) for block in trained.network.blocks()]
            outside, largest = count(trained.network) - sum(blocks), max(blocks, default=0)
            total += parameter_bytes * (outside + 2 * largest) + (parameter_bytes + 4) * largest
    return total


def count(network: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(parameter.numel() for parameter in network.parameters())


def memory_column(plan: Plan, cluster: Cluster, strategy: Strategy, checkpointing: bool) -> dict[str, float]:
    """Return bytes by kind on the GPU with the most."""
    state, cost = expected_bytes(plan.networks, cluster.world_size, strategy, cluster.nodes), plan.costs[checkpointing]
    sharded = strategy != "ddp"
    copies = cost.weight_copies if sharded else 0
    buffers = gathered_bytes(plan.networks, plan.parameter_bytes) if sharded else 0
    buckets = sum(expected_bytes([t], 1, "ddp").gradients for t in plan.networks if not (sharded and t.sharded))
    column = {
        "parameters": state.parameters,
        "gradients": state.gradients,
        "optimizer": state.optimizer,
        "moving averages": state.averages,
        "frozen networks": sum(size_of(t) for n in plan.frozen for t in (*n.parameters(), *n.buffers())),
        "communication buffers": buffers + buckets if cluster.world_size > 1 else 0,
        "saved activations": cost.saved - copies,
        "temporary": cost.peak - cost.saved,
    }
    return column | {"total": sum(column.values())}


def time_column(
    plan: Plan, cluster: Cluster, strategy: Strategy, checkpointing: bool, options: Any
) -> dict[str, float]:
    """Return gigabytes sent and seconds by kind."""
    state = expected_bytes(plan.networks, cluster.world_size, strategy, cluster.nodes)
    sent = transfers(plan.networks, cluster, strategy, plan.parameter_bytes, plan.micro_batches)
    flops = plan.costs[checkpointing].flops * plan.micro_batches
    machine, shares = MACHINES[options.gpu], (options.utilisation, options.link_utilisation)
    time = step_time(flops, state, sent, machine, plan.precision, *shares)
    samples = plan.samples * plan.micro_batches * cluster.world_size
    return {
        "GB sent": sum(transfer.sent for transfer in sent) / 1e9,
        "GB sent between nodes": sum(transfer.sent for transfer in sent if transfer.between_nodes) / 1e9,
        "seconds: computation": time.compute,
        "seconds: update": time.update,
        "seconds: communication": time.communication,
        "seconds per step, overlapped": time.overlapped,
        "seconds per step, not overlapped": time.serial,
        "samples per second, overlapped": samples / time.overlapped,
    }


def table(columns: dict[str, dict[str, float]], scale: float = 1.0, digits: int = 2) -> list[str]:
    """Return the lines of a table with one column per entry."""
    rows = list(next(iter(columns.values())))
    lines = [" " * 34 + "".join(f"{name:>11}" for name in columns)]
    for row in rows:
        lines.append(f"{row:<34}" + "".join(f"{column[row] / scale:>11.{digits}f}" for column in columns.values()))
    return lines


def report(title: str, plan: Plan, cluster: Cluster, options: Any) -> list[str]:
    """Return the lines to print for one config."""
    strategies = [s for s in get_args(Strategy) if s != "hsdp" or cluster.nodes > 1]
    cases = [(strategy, checkpointing) for strategy in strategies for checkpointing in (False, True)]
    names = [f"{strategy}{' +ac' if checkpointing else ''}" for strategy, checkpointing in cases]
    memory = {n: memory_column(plan, cluster, *case) for n, case in zip(names, cases, strict=True)}
    times = {n: time_column(plan, cluster, *case, options) for n, case in zip(names, cases, strict=True)}
    limit = (1 - RESERVE) * options.memory * GIBIBYTE
    fits = "".join(f"{'yes' if column['total'] <= limit else 'no':>11}" for column in memory.values())
    flops = [cost.flops * plan.micro_batches / 1e12 for cost in plan.costs.values()]
    trained = ", ".join(f"{t.name} {count(t.network) / 1e6:.1f} M" for t in plan.networks)
    machine = MACHINES[options.gpu]
    return [
        f"{title}: {cluster.nodes} nodes x {cluster.gpus_per_node} GPUs, {plan.samples} samples per GPU, "
        f"{plan.micro_batches} micro-batches per step, {plan.precision}",
        f"parameters: {trained}; frozen {sum(map(count, plan.frozen)) / 1e6:.1f} M in {len(plan.frozen)} networks",
        f"TFLOP per GPU and step: {flops[0]:.1f}, with activation checkpointing (+ac) {flops[1]:.1f}",
        "",
        "GiB per GPU",
        *table(memory, GIBIBYTE),
        f"{f'fits into {options.memory:g} GiB less {RESERVE:.0%}':<34}{fits}",
        "",
        f"per step: {machine.name} at {options.utilisation:.0%} of its peak, links at {options.link_utilisation:.0%}",
        *table(times, digits=3),
    ]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse options; ``others`` go to ``main.py fit``."""
    parser = argparse.ArgumentParser(prog="python -m tools.plan", description=__doc__)
    parser.add_argument("--config", action="append", default=[], help="config file; later ones win")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--memory", type=float, default=80, help="GiB per GPU")
    parser.add_argument("--gpu", choices=MACHINES, default="h100", help="peak rates and bandwidths")
    parser.add_argument("--utilisation", type=float, default=0.4, help="share of the GPU's peak rate that is reached")
    parser.add_argument(
        "--link-utilisation", type=float, default=0.7, help="share of the links' bandwidth that is reached"
    )
    options, options.others = parser.parse_known_args(arguments)
    if min(options.nodes, options.gpus_per_node) < 1:
        parser.error(f"--nodes {options.nodes} and --gpus-per-node {options.gpus_per_node} must be positive")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the plan for a command line."""
    warnings.filterwarnings("ignore", "LightningCLI's args parameter")  # given on purpose
    warnings.filterwarnings("ignore", ".*copying from a non-meta parameter")  # only sizes matter
    options = parse(arguments)
    cluster = Cluster(options.nodes, options.gpus_per_node)
    config = read_config([*(f"--config={path}" for path in options.config), *options.others])
    try:
        plan = make_plan(config, cluster.world_size)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    print("\n".join(report(config["experiment"], plan, cluster, options)))


if __name__ == "__main__":
    main()
