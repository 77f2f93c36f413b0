"""Builds the network that ``fit`` trains without memory on all processes but the first, which sends the shards."""

from typing import get_type_hints

import torch
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment


def is_first_process() -> bool:
    """Return whether this is the first process, from the launcher's variables; True without a launcher."""
    for launched in (TorchElasticEnvironment, SLURMEnvironment):
        if launched.detect():
            return launched().global_rank() == 0
    environment = LightningEnvironment()
    return environment.node_rank() == 0 and environment.local_rank() == 0


def build_trained_network(cli: LightningCLI) -> None:
    """Replace the description of the trained network in the config by the network, built on the meta device.

    This happens in ``fit`` if ``trainer.strategy.init_args.meta_device`` is true, except on the first process. The task
    then builds moving averages without memory too, and sharding fills all of them with the first process's values.

    Raises:
        ValueError: on every process, if the task is unknown, and so the network that it trains.
    """
    config = cli.config[cli.subcommand]
    strategy = config.trainer.strategy
    wanted = isinstance(strategy, Namespace) and strategy.get("init_args.meta_device")
    if cli.subcommand != "fit" or not wanted:
        return
    from maetok.checkpoints.building import imported  # --help should not wait for it

    task = imported(config.model.class_path)
    name = next(iter(getattr(task, "trains", {})), None)
    if name is None:
        raise ValueError(
            f"trainer.strategy.init_args.meta_device=true, but model.class_path={config.model.class_path} does not say "
            "what it trains: set meta_device to false, or give the task an attribute `trains`"
        )
    if is_first_process():
        return
    cli._dump_config()  # keep the description in the task's hyper-parameters
    parser = ArgumentParser()
    parser.add_argument(f"--{name}", type=get_type_hints(task.__init__)[name])
    with torch.device("meta"):
        config.model.init_args[name] = parser.instantiate(Namespace({name: config.model.init_args[name]}))[name]
