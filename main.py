"""The suite's command line: ``python main.py {fit,validate,test,predict} --config FILE [--config FILE ...]``."""

import gc

gc.disable()  # imports leave no garbage, and searching it makes --help 2.5 s slower
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import TensorBoardLogger

from callbacks import Heartbeat
from callbacks.resilience.checkpointing import resolve_checkpoint
from callbacks.trainer_setup import trainer_defaults, with_slurm
from command_line import InterpolatingCLI
from strategies.meta_device import build_trained_network  # its package registers strategies

gc.freeze()
gc.enable()


class MAETokCLI(InterpolatingCLI):
    """LightningCLI that gives each experiment one run directory, in which a restart continues."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the name of the run and the watch over its processes."""
        parser.add_argument("--experiment", type=str, default="unnamed", help="name of the run directory under runs/")
        parser.add_lightning_class_args(Heartbeat, "heartbeat")

    def before_instantiate_classes(self) -> None:
        """Save the config of each subcommand under its own name, and build a sharded network without memory."""
        self.save_config_kwargs["config_filename"] = f"config_{self.subcommand}.yaml".replace("_fit", "")
        build_trained_network(self)

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Log to TensorBoard in the run directory, unless the config says otherwise."""
        config = self.config[self.subcommand]
        run = kwargs["default_root_dir"] = config.trainer.default_root_dir or f"runs/{config.experiment}"
        if config.trainer.logger in (None, True):
            kwargs["logger"] = TensorBoardLogger(run, name="", version="")
        kwargs["plugins"] = with_slurm(self._get(self.config_init, "trainer").plugins)
        return super().instantiate_trainer(**kwargs)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Resolve ``--ckpt_path last``, and refuse to start a run in the directory of another one."""
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        kwargs["ckpt_path"] = resolve_checkpoint(kwargs.get("ckpt_path"), self.trainer.default_root_dir, subcommand)
        return kwargs


def main(args: list[str] | None = None) -> MAETokCLI:
    """Run one command; ``args`` defaults to the arguments of the command line."""
    return MAETokCLI(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=0,
        trainer_defaults=trainer_defaults(),
        auto_configure_optimizers=False,
        save_config_kwargs={"overwrite": True},  # a restart saves it again
        args=args,
    )


if __name__ == "__main__":
    main()
