"""Results of a run in a file; ``python -m tools.compare_runs`` makes a table of several runs."""

import json
import time
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from callbacks.schedule import current_step


class RunReport(Callback):
    """Appends the metrics of each validation, and the early signal, to ``metrics.jsonl`` in the run directory.

    The subcommands ``validate`` and ``test`` write ``metrics_validate.jsonl`` and ``metrics_test.jsonl``.
    """

    def __init__(self) -> None:
        self.started = time.monotonic()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write one line: step, minutes since the start of this process, metrics."""
        if not trainer.sanity_checking:
            self.write(trainer, pl_module)

    on_test_end = on_validation_end

    @rank_zero_only
    def write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Append the current metrics."""
        metrics = {
            name: float(value)
            for name, value in trainer.callback_metrics.items()
            if name.startswith(("validation/", "early/"))
        }
        minutes = (time.monotonic() - self.started) / 60
        record = {"step": current_step(trainer, pl_module), "minutes": minutes, **metrics}
        suffix = "" if trainer.state.fn == "fit" else f"_{trainer.state.fn.value}"
        path = Path(trainer.default_root_dir) / f"metrics{suffix}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps(record) + "\n")
