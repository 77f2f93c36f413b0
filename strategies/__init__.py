"""Strategies that shard networks over processes; importing this registers ``fsdp2`` and ``hsdp``."""

from lightning.pytorch.strategies import StrategyRegistry

from strategies.fsdp import FSDP2Strategy

__all__ = ["FSDP2Strategy"]

for name, replicate in (("fsdp2", 1), ("hsdp", "nodes")):
    StrategyRegistry.register(name, FSDP2Strategy, override=True, replicate=replicate)
