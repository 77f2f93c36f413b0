"""Divide networks among processes with FSDP2. Each block is a unit, and so is the rest of each part.

A part is a module that is called as a whole (an encoder, a decoder, a denoiser). Every process holds an equal share of
a sharded parameter, of its gradient, of its optimizer state and of its moving average.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from maetok.networks.layers.network import CachesWeights, Network
from maetok.runtime.distributed import several_processes


def shard(
    network: Network,
    mesh: DeviceMesh,
    device: torch.device,
    dtype: torch.dtype | None = None,
    stays_gathered: bool = False,
) -> None:
    """Divide a network among the processes of a mesh, in place. Call this before the optimizer is built.

    All processes get the parameters of the first one. The other processes may build the network on the meta device
    (``with torch.device("meta")``). They then never hold more of it than their shares and one parameter.

    Args:
        network: its parts, blocks and float32 modules become units.
        mesh: (shards) or (replicas, shards) processes.
        device: device of this process.
        dtype: dtype of the parameters while they compute; parameters are kept, and gradients averaged, in float32.
            None for the dtype that they have. Float32 modules always keep theirs.
        stays_gathered: once gathered, keep all weights on every process until :func:`reshard`. Otherwise blocks drop
            their weights between the forward and the backward pass, and only the rest of a part keeps its weights:
            the adaptive weight of the adversarial loss needs the gradient at the last layer. Modules that are not
            trained always stay gathered, because a moving average shares them (:class:`maetok.training.ema.EMA`).

    Raises:
        ValueError: if a block or a float32 module is not inside a part.
    """
    # FSDP2 warns of views because outputs could be changed in place. Nothing here does that.
    warnings.filterwarnings("ignore", r"FSDP2-wrapped module \(\w+\) returned a view tensor")
    values = {name: value.detach() for name, value in network.named_parameters() if not isinstance(value, DTensor)}
    parts, float32 = network.parts(), set(network.float32_modules())
    divided = {*parts, *network.blocks(), *float32}
    found = [module for part in parts for module in reversed(list(part.modules())) if module in divided]
    if len(found) != len(divided):
        raise ValueError(f"{type(network).__name__}: blocks() or float32_modules() has modules that no part contains")
    for module in network.modules():
        if isinstance(module, CachesWeights):
            module.stop_caching()
    for module in found:  # inner ones before the part that contains them
        if isinstance(module, FSDPModule):  # an average shares the modules that are not trained
            continue
        frozen = not any(parameter.requires_grad for parameter in module.parameters())
        lowered = None if module in float32 or frozen else dtype  # averages compute in float32
        policy = MixedPrecisionPolicy(lowered, torch.float32 if lowered else None, cast_forward_inputs=False)
        fully_shard(
            module,
            mesh=mesh,
            reshard_after_forward=False if stays_gathered or frozen else None,
            mp_policy=policy,
            shard_placement_fn=placement(mesh),
        )
    take_from_first(network, values, device)


@torch.no_grad()
def take_from_first(network: nn.Module, values: dict[str, Tensor], device: torch.device) -> None:
    """Fill a sharded network with the parameter ``values`` of the first process.

    Raises:
        ValueError: on the first process, if its values are on the meta device.
    """
    if any(value.is_meta for value in values.values()):
        if dist.get_rank() == 0:
            raise ValueError(
                "the first process has built the network on the meta device, but all processes take its weights. The "
                "variables of the launcher (RANK, LOCAL_RANK, NODE_RANK, SLURM_PROCID) may name another process as "
                "first: correct them, or set trainer.strategy.init_args.meta_device to false"
            )
        network._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)
    for name, parameter in network.named_parameters():
        if name not in values:
            continue
        value = values.pop(name)
        sent = torch.empty(value.shape, dtype=value.dtype, device=device) if value.is_meta else value.to(device)
        assert isinstance(parameter, DTensor)
        to_local_shard(parameter).copy_(
            to_local_shard(distribute_tensor(sent, parameter.device_mesh, parameter.placements))
        )


def divided_dimension(shape: Sequence[int], shards: int) -> int:
    """Return the dimension along which a parameter is divided: the first that divides evenly, or else dimension 0."""
    return next((dimension for dimension, size in enumerate(shape) if size % shards == 0), 0)


def placement(mesh: DeviceMesh) -> Callable[[nn.Parameter], Shard]:
    """Return a function that tells FSDP2 how to divide each parameter among the shards of a mesh."""
    shards = mesh.size(mesh.ndim - 1)
    return lambda parameter: Shard(divided_dimension(parameter.shape, shards))


def units(network: nn.Module) -> Iterator[FSDPModule]:
    """Return all sharded modules of a network; none if it is not sharded."""
    return (module for module in network.modules() if isinstance(module, FSDPModule))


def gather(network: nn.Module) -> None:
    """Gather all weights on every process until :func:`reshard`, so that each process can run the network alone."""
    for unit in units(network):
        unit.unshard()


def reshard(network: nn.Module) -> None:
    """Reduce every process to its own share; after a forward pass without a backward pass it may hold more."""
    for unit in units(network):
        unit.reshard()


def is_sharded(network: nn.Module) -> bool:
    """Return whether any module of the network is sharded."""
    return any(True for _ in units(network))


def to_local_shard(tensor: Tensor) -> Tensor:
    """Return this process's share of a sharded tensor, in the same memory; return any other tensor unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def to_full_tensor(tensor: Tensor) -> Tensor:
    """Return a sharded tensor in full, on every process. All processes must call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def broadcast_from_first(module: nn.Module, device: torch.device) -> None:
    """Copy the parameters and buffers of the first process to all processes, except those that are sharded."""
    if not several_processes():
        return
    for tensor in (*module.parameters(), *module.buffers()):
        if isinstance(tensor, DTensor):
            continue
        sent = tensor.detach().to(device).contiguous()
        dist.broadcast(sent, 0)
        tensor.copy_(sent)


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average the gradients of replicated parameters over all processes, in one message."""
    if not several_processes():
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    parts = flat.split([gradient.numel() for gradient in gradients])
    torch._foreach_copy_(gradients, [part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True)])
