"""What the callbacks share that measure under an evaluation protocol."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from callbacks.schedule import current_step, is_due
from maetok.metrics import Metric
from maetok.metrics.features import feature_network
from maetok.metrics.protocols import Measurement, append_record


class ProtocolCallback(Callback):
    """Decides when to measure, and logs, prints and writes what was measured.

    A subclass feeds an :class:`maetok.metrics.evaluator.ImageEvaluator`. A result NAME is logged as
    ``validation/NAME``; only Fréchet distances get a prefix that says what was measured: ``rfid`` and ``gfid`` with
    Inception, ``reconstruction_fd`` and ``sample_fd`` with any other network.
    """

    measured: ClassVar[Literal["reconstruction", "sample"]]
    logged_elsewhere: ClassVar[Sequence[str]] = ()
    """Results that only go to ``metrics.json``."""

    def __init__(self, features: nn.Module, metrics: Sequence[Metric], every_n_steps: int) -> None:
        self.features, self.metrics, self.every_n_steps = feature_network(features), metrics, every_n_steps
        self.logged: set[str] = set()

    def measures(self, trainer: Trainer) -> bool:
        """Return whether to measure in this validation."""
        return not trainer.sanity_checking and is_due(trainer, self.every_n_steps)

    def logged_name(self, name: str) -> str:
        """Return the name under which a result is logged."""
        short = {"reconstruction": "r", "sample": "g"}[self.measured]
        prefixes = {"fid": short, "sfid": short, "fd": f"{self.measured}_", "sfd": f"{self.measured}_"}
        return f"validation/{prefixes.get(name, '')}{name}"

    def forget(self, trainer: Trainer) -> None:
        """Remove the results of an earlier validation, which reports would take for results of this one."""
        for name in self.logged:
            trainer.callback_metrics.pop(name, None)

    def report(self, trainer: Trainer, pl_module: Any, measurement: Measurement, more: Mapping[str, Any]) -> None:
        """Log and print a measurement; append it with ``more`` to ``metrics.json`` in the run directory."""
        assert trainer.state.fn is not None
        for name, value in measurement.values.items():
            if name not in self.logged_elsewhere:
                self.logged.add(self.logged_name(name))
                pl_module.log(self.logged_name(name), value, rank_zero_only=True)
        rank_zero_info(str(measurement))
        where = {"step": current_step(trainer, pl_module), "subcommand": trainer.state.fn.value}
        if trainer.is_global_zero:
            append_record(Path(trainer.default_root_dir) / "metrics.json", where | measurement.record() | dict(more))
