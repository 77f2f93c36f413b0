"""Fully sharded training (FSDP2) that needs to be told no number of processes."""

from collections.abc import Generator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal

from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule


class FSDP2Strategy(ModelParallelStrategy):
    """Shards the networks that a task trains over all processes, or over those of each group of replicas (HSDP).

    The task does the sharding, in ``configure_model``; what it does not shard is whole on every process.

    Args:
        replicate: number of replicas of the sharded networks: 1 divides them among all processes; ``nodes`` among the
            processes of a node, so that only averaged gradients travel between nodes; the number of processes makes
            every one hold everything, as DDP does.
        timeout_minutes: how long a process waits for the others before the run ends with an error.
        process_group_backend: that of torch.distributed; nccl on CUDA and gloo on CPU if not given.

    Raises:
        ValueError: if ``replicate`` or ``timeout_minutes`` is not positive.
    """

    def __init__(
        self,
        replicate: int | Literal["nodes"] = 1,
        timeout_minutes: float = 10.0,
        process_group_backend: str | None = None,
    ) -> None:
        if timeout_minutes <= 0 or (replicate != "nodes" and replicate < 1):
            raise ValueError(
                f"trainer.strategy.init_args: replicate={replicate} must be positive or nodes, "
                f"timeout_minutes={timeout_minutes} positive"
            )
        timeout = timedelta(minutes=timeout_minutes)
        super().__init__(tensor_parallel_size=1, process_group_backend=process_group_backend, timeout=timeout)
        self.replicate = replicate

    def setup_environment(self) -> None:
        """Begin communication, and lay out processes as (replicas, shards).

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
        """Every process reads data of its own."""
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    @contextmanager
    def block_backward_sync(self) -> Generator[None, None, None]:
        """Let backward passes add gradients up on each process, without averaging them."""
        assert self.lightning_module is not None
        units = [module for module in self.lightning_module.modules() if isinstance(module, FSDPModule)]
        for unit in units:
            unit.set_requires_gradient_sync(False, recurse=False)
        try:
            yield
        finally:
            for unit in units:
                unit.set_requires_gradient_sync(True, recurse=False)
