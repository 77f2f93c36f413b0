"""Records of measurements in the run directory."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from callbacks.schedule import training_step
from maetok.metrics.protocols import Measurement, append_record


def write_measurement(trainer: Trainer, pl_module: Any, measurement: Measurement, more: dict[str, Any]) -> None:
    """Append a measurement, with what else is to be known of it, to ``metrics.json``; the first process does."""
    assert trainer.state.fn is not None
    where = {"step": training_step(trainer, pl_module), "subcommand": trainer.state.fn.value}
    if trainer.is_global_zero:
        append_record(Path(trainer.default_root_dir) / "metrics.json", where | measurement.record() | more)
