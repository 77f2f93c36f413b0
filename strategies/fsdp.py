"""Fully sharded training (FSDP2) that finds the number of processes itself."""

from collections.abc import Generator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from jsonargparse.typing import PositiveFloat, PositiveInt
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from maetok.checkpoints.files import CheckpointFiles
from maetok.checkpoints.restoring import restore


class FSDP2Strategy(ModelParallelStrategy):
    """Shards the networks that a task trains over all processes, or within each replica (HSDP).

    The task shards them in ``configure_model``. Every process holds everything else whole.

    Args:
        replicate: number of replicas of the sharded networks. 1 shards them over all processes. ``nodes`` shards them
            within each node, so that only averaged gradients travel between nodes. With as many replicas as processes
            every process holds everything, as under DDP.
        timeout_minutes: how long a process waits for the others before the run ends with an error.
        sharded_checkpoint: write a checkpoint as a folder with one file per process; otherwise the first process
            gathers everything and writes one file.
        meta_device: with ``main.py fit``, only the first process builds the trained networks with values. The others
            build them on the meta device, so they never hold a whole network; see :mod:`strategies.meta_device`.
        process_group_backend: backend of torch.distributed; nccl on CUDA and gloo on CPU if not given.
    """

    def __init__(
        self,
        replicate: PositiveInt | Literal["nodes"] = 1,
        timeout_minutes: PositiveFloat = 10.0,
        sharded_checkpoint: bool = True,
        meta_device: bool = False,
        process_group_backend: str | None = None,
    ) -> None:
        timeout = timedelta(minutes=timeout_minutes)
        super().__init__(tensor_parallel_size=1, process_group_backend=process_group_backend, timeout=timeout)
        self.replicate, self.sharded_checkpoint, self.meta_device = replicate, sharded_checkpoint, meta_device
        self.checkpoint_io = CheckpointFiles()  # type: ignore[assignment] # has the methods of a CheckpointIO

    def setup_environment(self) -> None:
        """Start communication, and arrange processes as (replicas, shards).

        Raises:
            ValueError: if ``replicate`` does not divide the number of processes.
        """
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()
        replicas = self.num_nodes if self.replicate == "nodes" else self.replicate
        if self.world_size % replicas:
            raise ValueError(
                f"trainer.strategy.init_args.replicate={replicas} does not divide the number of processes, "
                f"{self.world_size}"
            )
        shape = (self.world_size,) if replicas == 1 else (replicas, self.world_size // replicas)
        names = ("replicas", "shards")[-len(shape) :]
        self._device_mesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=names)
        assert self.lightning_module is not None
        self.lightning_module._device_mesh = self._device_mesh

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Return that every process reads its own data."""
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    @contextmanager
    def block_backward_sync(self) -> Generator[None, None, None]:
        """Let backward passes accumulate gradients on each process without averaging them."""
        assert self.lightning_module is not None
        units = [module for module in self.lightning_module.modules() if isinstance(module, FSDPModule)]
        for unit in units:
            unit.set_requires_gradient_sync(False, recurse=False)
        try:
            yield
        finally:
            for unit in units:
                unit.set_requires_gradient_sync(True, recurse=False)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return all weights, sharded weights as shards."""
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the state of an optimizer by parameter index, sharded tensors as shards.

        Lightning's version would step an optimizer that has not stepped yet, such as the optimizer of a discriminator
        before its first active step.
        """
        return getattr(optimizer, "_optimizer", optimizer).state_dict()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint; every process holds its shards."""
        path = Path(self.broadcast(filepath))
        if self.sharded_checkpoint:
            self.checkpoint_io.save_checkpoint(checkpoint, path, storage_options)
            return
        whole = gathered(checkpoint)
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(whole, path, storage_options)
        self.barrier()

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint of any strategy and number of processes into task and optimizers; return the rest."""
        assert self.lightning_module is not None
        return restore(Path(self.broadcast(checkpoint_path)), self.lightning_module, self.optimizers)


def gathered(value: Any) -> Any:
    """Return a checkpoint with whole tensors on the CPU instead of shards. All processes call this together."""
    if isinstance(value, DTensor):
        return value.full_tensor().cpu()
    if isinstance(value, dict):
        return {key: gathered(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(gathered(entry) for entry in value)
    return value
