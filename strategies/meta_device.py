"""What ``fit`` trains, built without memory on all processes but the first, which sends them shares."""

from typing import get_type_hints

import torch
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment


def is_first_process() -> bool:
    """Whether this process is the first of all, by what its launcher has told it; True if there is none yet."""
    for launched in (TorchElasticEnvironment, SLURMEnvironment):
        if launched.detect():
            return launched().global_rank() == 0
    environment = LightningEnvironment()
    return environment.node_rank() == 0 and environment.local_rank() == 0


def build_trained_network(cli: LightningCLI) -> None:
    """In the config, put the network that is trained, on the meta device, in the place of its description.

    This happens in ``fit`` if ``trainer.strategy.init_args.meta_device`` is true, and not on the first process. The
    task then makes moving averages without memory too, and sharding fills all with the values of the first process.

    Raises:
        ValueError: on every process, if it is not known what the task trains.
    """
    from maetok.hub.export import TRAINED, imported  # knows all networks; --help should not wait for them

    config = cli.config[cli.subcommand]
    strategy = config.trainer.strategy
    wanted = isinstance(strategy, Namespace) and strategy.get("init_args.meta_device")
    if cli.subcommand != "fit" or not wanted:
        return
    task = config.model.class_path
    name = TRAINED.get(task.rpartition(".")[2])
    if name is None:
        raise ValueError(
            f"trainer.strategy.init_args.meta_device=true, but model.class_path={task} is none of "
            f"{', '.join(TRAINED)}, so what it trains is unknown: set meta_device to false"
        )
    if is_first_process():
        return
    cli._dump_config()  # the hyper-parameters of the task, which hold the description
    parser = ArgumentParser()
    parser.add_argument(f"--{name}", type=get_type_hints(imported(task).__init__)[name])
    with torch.device("meta"):
        config.model.init_args[name] = parser.instantiate(Namespace({name: config.model.init_args[name]}))[name]
