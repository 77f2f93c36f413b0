"""Bytes that one process sends per step, and an estimate of the time of a step."""

from collections.abc import Sequence
from dataclasses import dataclass

from maetok.runtime.flops import GPU_PEAKS, PeakRates
from tools.plan.state import StateBytes, Strategy, Trained, size_of


@dataclass(frozen=True)
class Machine:
    """A GPU and its links, with the vendor's peak figures; bandwidths of links are per direction.

    Args:
        name: name in tables.
        peak: FLOP/s of dense matrix products; float32 products do not use TF32.
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
    """The processes of a run: one per GPU."""

    nodes: int
    gpus_per_node: int

    @property
    def world_size(self) -> int:
        """Return the number of processes."""
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Transfer:
    """Bytes that one process sends per optimizer step in one kind of collective operation.

    Args:
        name: name in tables.
        sent: number of bytes.
        between_nodes: whether they cross the network.
    """

    name: str
    sent: float
    between_nodes: bool


def transfers(
    networks: Sequence[Trained], cluster: Cluster, strategy: Strategy, parameter_bytes: int, micro_batches: int = 1
) -> list[Transfer]:
    """Return what one process sends per step by rings.

    A ring sends (W - 1) / W of a tensor for gather and scatter, and twice as much for all-reduce. Sharded networks
    gather their parameters, in the dtype of the computation, for every forward and again for every backward pass, and
    scatter float32 gradients once per optimizer step. Replicated networks all-reduce float32 gradients once per
    optimizer step. With ``hsdp`` each node shards for itself, and shards of gradients are all-reduced between nodes.
    Small messages are left out: buffers, gradient norms, the norms of the adaptive weight, the guard.

    Args:
        networks: trained networks.
        cluster: processes of the run.
        strategy: distribution of the networks.
        parameter_bytes: bytes of a gathered parameter: 2 for bfloat16, 4 for float32.
        micro_batches: micro-batches per optimizer step.
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
    """Time of the FLOPs at the given utilisation of the peak rate."""
    update: float
    """Time of optimizer and moving averages, bound by memory: seven and three passes over their parameters."""
    communication: float
    """Time of all transfers, one after another."""

    @property
    def overlapped(self) -> float:
        """Return the time if computation hides communication as far as possible."""
        return max(self.compute, self.communication) + self.update

    @property
    def serial(self) -> float:
        """Return the time if computation hides no communication."""
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
        flops: FLOPs of one process in all micro-batches.
        state: bytes of state on one process.
        sent: transfers of one process.
        machine: peak rates of the GPU.
        precision: ``trainer.precision``.
        utilisation: share of the peak rate that computation reaches.
        link_utilisation: share of the peak bandwidth that transfers reach.
    """
    rate = machine.peak.bfloat16 if precision == "bf16-mixed" else machine.peak.float32
    # AdamW reads 4 and writes 3 tensors; an average reads 2 and writes 1.
    passes = 7 * state.gradients + 3 * state.averages
    seconds = sum(t.sent / (machine.network_bandwidth if t.between_nodes else machine.node_bandwidth) for t in sent)
    return StepTime(flops / rate / utilisation, passes / machine.memory_bandwidth, seconds / link_utilisation)
