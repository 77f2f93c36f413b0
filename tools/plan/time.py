"""Bytes that one process sends per step, and an estimate of the time of a step with its assumptions."""

from collections.abc import Sequence
from dataclasses import dataclass

from maetok.runtime.flops import GPU_PEAKS, PeakRates
from tools.plan.state import StateBytes, Strategy, Trained, size_of


@dataclass(frozen=True)
class Machine:
    """One GPU and what connects it; the vendors' peak figures, per direction for links.

    Args:
        name: for tables.
        peak: FLOP/s of dense matrix products; float32 ones are done without TF32.
        memory_bandwidth: bytes/s.
        node_bandwidth: bytes/s to the other GPUs of the node.
        network_bandwidth: bytes/s of each GPU to other nodes.
    """

    name: str
    peak: PeakRates
    memory_bandwidth: float
    node_bandwidth: float
    network_bandwidth: float


MACHINES = {
    "h100": Machine("h100", GPU_PEAKS["H100"], 3.35e12, 450e9, 50e9),  # SXM, NVLink 4, 400 Gb/s per GPU
    "a100": Machine("a100", GPU_PEAKS["A100"], 2.0e12, 300e9, 25e9),  # SXM 80 GB, NVLink 3, 200 Gb/s per GPU
}


@dataclass(frozen=True)
class Cluster:
    """The processes of a run, one per GPU."""

    nodes: int
    gpus_per_node: int

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Transfer:
    """What one process sends per optimizer step in one kind of collective operation.

    Args:
        name: for tables.
        sent: bytes.
        between_nodes: whether it crosses the network.
    """

    name: str
    sent: float
    between_nodes: bool


def transfers(
    networks: Sequence[Trained], cluster: Cluster, strategy: Strategy, parameter_bytes: int, micro_batches: int = 1
) -> list[Transfer]:
    """Bytes sent per step by rings: (W - 1) / W of a tensor for gather and scatter, twice that for all-reduce.

    Sharded networks gather their parameters, in the dtype of the computation, for every forward and again for every
    backward pass, and scatter float32 gradients once per optimizer step; replicated ones all-reduce float32 gradients
    once per optimizer step. With ``hsdp`` each node does the former by itself and shards of gradients are all-reduced
    between nodes. Left out are small ones: buffers, gradient norms, the norms of the adaptive weight, the guard.

    Args:
        networks: what is trained.
        cluster: processes.
        strategy: how networks are laid out.
        parameter_bytes: bytes of a gathered parameter: 2 for bfloat16, 4 for float32.
        micro_batches: per optimizer step.
    """
    group = cluster.gpus_per_node if strategy == "hsdp" else cluster.world_size
    crosses = cluster.nodes > 1
    share, whole = (group - 1) / group, (cluster.world_size - 1) / cluster.world_size
    found: list[Transfer] = []
    for trained in networks:
        elements = [p.numel() for p in trained.network.parameters()]
        gradients = sum(size_of(p) for p in trained.network.parameters() if p.requires_grad)
        name = trained.name
        if strategy == "ddp" or not trained.sharded:
            found.append(Transfer(f"all-reduce gradients, {name}", 2 * whole * gradients, crosses))
            continue
        inside = crosses and strategy == "fsdp"
        gathered = 2 * micro_batches * share * parameter_bytes * sum(elements)
        found.append(Transfer(f"all-gather parameters, {name}", gathered, inside))
        found.append(Transfer(f"reduce-scatter gradients, {name}", share * gradients, inside))
        if strategy == "hsdp" and crosses:
            between = 2 * (cluster.nodes - 1) / cluster.nodes * gradients / group
            found.append(Transfer(f"all-reduce shards between nodes, {name}", between, True))
    return found


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step."""

    compute: float
    """FLOPs at the given utilisation of the peak rate."""
    update: float
    """Optimizer and moving averages, bound by memory bandwidth: seven and three passes over their parameters."""
    communication: float
    """All transfers, one after another."""

    @property
    def overlapped(self) -> float:
        """Communication hidden behind computation as far as it fits."""
        return max(self.compute, self.communication) + self.update

    @property
    def serial(self) -> float:
        """Nothing hidden."""
        return self.compute + self.communication + self.update


def step_time(
    flops: float,
    state: StateBytes,
    sent: Sequence[Transfer],
    machine: Machine,
    precision: str,
    utilisation: float,
    link_utilisation: float,
) -> StepTime:
    """Estimate the time of a step.

    Args:
        flops: of one process in all micro-batches.
        state: on one process.
        sent: by one process.
        machine: peak rates.
        precision: ``trainer.precision``.
        utilisation: share of the peak rate that computation reaches.
        link_utilisation: share of the peak bandwidth that transfers reach.
    """
    rate = machine.peak.bfloat16 if precision == "bf16-mixed" else machine.peak.float32
    passes = (
        7 * state.gradients + 3 * state.averages
    )  # AdamW reads 4 and writes 3 tensors, an average reads 2, writes 1
    seconds = sum(t.sent / (machine.network_bandwidth if t.between_nodes else machine.node_bandwidth) for t in sent)
    return StepTime(flops / rate / utilisation, passes / machine.memory_bandwidth, seconds / link_utilisation)
