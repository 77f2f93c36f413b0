"""Settings that every Trainer of the command line gets besides its config."""

from typing import Any

from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

from callbacks.resilience.continued_curve import ContinuedCurve
from callbacks.resilience.requeue import Requeue


def trainer_defaults() -> dict[str, Any]:
    """Return defaults of the section ``trainer``; its callbacks are added to the config's."""
    return {
        "use_distributed_sampler": False,  # datamodules divide samples among processes themselves
        "num_sanity_val_steps": 0,
        "max_epochs": -1,  # training data has no end; max_steps is the length of a run
        "check_val_every_n_epoch": None,  # val_check_interval counts micro-batches
        "callbacks": [Requeue(), ContinuedCurve()],
    }


def with_slurm(plugins: Any) -> list[Any]:
    """Return the plugins of ``trainer.plugins``, and under ``srun`` Slurm without Lightning's requeueing.

    Lightning would save inside the signal handler: in the middle of a step, and on each process separately.
    """
    given = plugins if isinstance(plugins, list) else [plugins] if plugins else []
    if any(isinstance(plugin, SLURMEnvironment) for plugin in given) or TorchElasticEnvironment.detect():
        return given
    return [*given, SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else given
