"""Steps that are skipped because loss or gradient is not finite, and loss spikes."""

import json
from collections import deque
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from callbacks.resilience.rollback import Rollback
from callbacks.resilience.step_records import OPTIMIZERS, Step, position_of, skipped_step_records
from maetok.checkpoints.runs import complete_checkpoints
from maetok.training.step_guard import StepGuard, all_finite

RECORDS = "unusual_steps.jsonl"


class NonFiniteError(RuntimeError):
    """Training cannot continue; the checkpoints written before are good."""


class LossHistory:
    """Measures how unusual a loss is, by median and median absolute deviation, which ignore single outliers.

    Args:
        window: number of recent losses to compare with; no loss is unusual before a quarter of them are known.
    """

    def __init__(self, window: int) -> None:
        self.losses: deque[float] = deque(maxlen=window)

    def add(self, loss: float) -> tuple[float, float]:
        """Return the median of the earlier losses, and by how many standard deviations this loss lies above it.

        The standard deviation is 1.4826 times the median absolute deviation, as in a normal distribution, and at least
        a thousandth of the median.
        """
        known = np.array(self.losses)
        self.losses.append(loss)
        if 4 * len(known) < self.losses.maxlen:
            return loss, 0.0
        median = float(np.median(known))
        deviation = max(1.4826 * float(np.median(np.abs(known - median))), 1e-3 * abs(median), 1e-12)
        return median, (loss - median) / deviation


class NonFiniteGuard(Callback):
    """Makes the task skip steps whose loss or gradient is not finite, and records them.

    Each skipped step is a line of ``unusual_steps.jsonl`` in the run directory, with the losses and sample indices of
    all its micro-batches on all processes. Each loss spike is a line with the position in the data order. The log
    counts both, over restarts too (``guard/skipped_steps``, ``guard/loss_spikes``). Weights that are not finite are
    never written to a checkpoint.

    After ``max_in_a_row`` skipped steps training ends, or rolls back up to ``rollbacks`` times: weights, moving
    averages, buffers and optimizer states return to the newest checkpoint from before these steps. Everything else
    continues, so other batches, masks and noise follow (:mod:`callbacks.resilience.rollback`). A rollback happens only
    after steps that are multiples of ``check_every_n_steps``, so a continued run rolls back where an uninterrupted run
    does; training that ends before such a step ends without a rollback. Each rollback is a line of the same file, and
    the log counts it (``guard/rollbacks``).

    Args:
        max_in_a_row: number of consecutive skipped steps that end training or cause a rollback.
        check_every_n_steps: read the verdicts after multiples of this and before every checkpoint. Reading waits for
            the GPU; skipping does not.
        spike_threshold: a loss this many robust standard deviations above the median is a spike.
        spike_window: number of recent steps to compare with.
        rollbacks: how often one run, over all its restarts, may roll back instead of ending. A rollback needs a
            checkpoint of :class:`callbacks.ResumableCheckpoint` from before the skipped steps, so ``keep_last`` must
            be large enough.
    """

    def __init__(
        self,
        max_in_a_row: PositiveInt = 10,
        check_every_n_steps: PositiveInt = 10,
        spike_threshold: PositiveFloat = 8.0,
        spike_window: PositiveInt = 200,
        rollbacks: NonNegativeInt = 0,
    ) -> None:
        self.max_in_a_row, self.check_every_n_steps = max_in_a_row, check_every_n_steps
        self.spike_threshold, self.history = spike_threshold, LossHistory(spike_window)
        self.skipped_steps, self.in_a_row, self.loss_spikes = 0, 0, 0
        self.first_bad: int | None = None  # of too many in a row, until training has rolled back
        self.rollback = Rollback(rollbacks)
        self.pending: list[Step] = []
        self.batches: list[dict[str, Any]] = []
        self.last_step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the task a guard, which skips steps."""
        if stage == "fit":
            pl_module.step_guard = StepGuard()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from the step of the checkpoint."""
        self.last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep what identifies the batch; check the steps at multiples of the interval, and roll back if necessary."""
        self.batches.append({name: batch[name] for name in ("indices", "position") if name in batch})
        if trainer.global_step == self.last_step:
            return  # one of several micro-batches
        self.last_step = trainer.global_step
        self.pending.append(Step(self.last_step, pl_module.step_guard.verdicts, self.batches))
        self.batches = []
        if self.last_step % self.check_every_n_steps == 0:
            self.check(trainer)
            if self.first_bad is not None:
                self.go_back(trainer, pl_module, self.first_bad)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the last steps, before the checkpoint of the last step."""
        self.check(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the counts and the last losses, after checking all steps and weights.

        Raises:
            NonFiniteError: on all processes, if weights on any process are not finite or too many steps were skipped.
        """
        self.check(trainer)
        if not all_finite(chain(pl_module.parameters(), pl_module.buffers())):
            raise NonFiniteError(
                f"weights are not finite at step {trainer.global_step}, so no checkpoint is written"
                f"{self.remedy(trainer)}"
            )
        checkpoint["non_finite_guard"] = {
            "skipped_steps": self.skipped_steps,
            "in_a_row": self.in_a_row,
            "loss_spikes": self.loss_spikes,
            "first_bad": self.first_bad,
            "rollbacks": self.rollback.spans,
            "losses": list(self.history.losses),
        }

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore counts and losses; a checkpoint of a run without guard has none."""
        state = checkpoint.get("non_finite_guard")
        if state is not None:
            self.skipped_steps, self.in_a_row = state["skipped_steps"], state["in_a_row"]
            self.loss_spikes, self.first_bad = state["loss_spikes"], state.get("first_bad")
            self.rollback.spans = state.get("rollbacks", [])  # older versions have none
            self.history.losses.extend(state["losses"])

    def check(self, trainer: Trainer) -> None:
        """Count, write and log the unusual steps since the last check. All processes call this together.

        Raises:
            NonFiniteError: on all processes, if ``max_in_a_row`` consecutive steps were skipped and no rollback is
                left.
        """
        steps, self.pending = self.pending, []
        verdicts = [(verdict.skipped, verdict.loss) for step in steps for verdict in step.verdicts.values()]
        numbers = iter(torch.stack([value for pair in verdicts for value in pair]).tolist() if verdicts else [])
        bad, records = [], []
        for step in steps:
            values = {index: (next(numbers), next(numbers)) for index in step.verdicts}
            skipped = [OPTIMIZERS[index] for index, (skip, _) in values.items() if skip]
            self.in_a_row = self.in_a_row + 1 if skipped else 0
            if self.in_a_row >= self.max_in_a_row and self.first_bad is None:
                self.first_bad = step.number - self.in_a_row + 1
            if skipped:
                bad.append((step, {"event": "non_finite", "step": step.number, "skipped": skipped}))
            elif record := self.spike(step, values[0][1]):
                records.append(record)
        self.skipped_steps, self.loss_spikes = self.skipped_steps + len(bad), self.loss_spikes + len(records)
        if bad:  # the same on all processes
            records += skipped_step_records(bad)
        if records:
            self.report(
                trainer,
                records,
                {"skipped_steps": self.skipped_steps, "loss_spikes": self.loss_spikes},
                f"up to step {self.last_step}: {len(bad)} steps skipped because loss or gradient was not finite, "
                f"{len(records) - len(bad)} loss spikes",
            )
        if self.first_bad is not None and not self.rollback.left:
            raise NonFiniteError(self.failure(trainer, self.first_bad))

    def go_back(self, trainer: Trainer, pl_module: LightningModule, first_bad: int) -> None:
        """Roll back to weights from before the step ``first_bad``. All processes call this together.

        Raises:
            NonFiniteError: on all processes, if there is no such checkpoint.
        """
        path = self.rollback.run(trainer, pl_module, first_bad)
        if path is None:
            raise NonFiniteError(
                f"{self.failure(trainer, first_bad)}. There is no checkpoint from before step {first_bad} to go back "
                "to: set every_n_steps of callbacks.ResumableCheckpoint lower, or keep_last higher if it was removed"
            )
        self.first_bad, self.in_a_row = None, 0
        record = {"event": "rollback", "step": self.last_step, "first_bad": first_bad, "checkpoint": path.name}
        self.report(
            trainer,
            [record],
            {"rollbacks": len(self.rollback.spans)},
            f"{self.max_in_a_row} steps from step {first_bad} on were skipped: training continues after step "
            f"{self.last_step} with the weights of {path.name}; {self.rollback.left} rollbacks are left",
        )

    def spike(self, step: Step, loss: float) -> dict[str, Any] | None:
        """Add the loss of a step to the history; return a record if it is a spike."""
        median, deviations = self.history.add(loss)
        if deviations < self.spike_threshold:
            return None
        record = {"event": "loss_spike", "step": step.number, "loss": loss, "median": median, "deviations": deviations}
        return record | {"position": position_of(step)}

    def report(self, trainer: Trainer, records: list[dict[str, Any]], counts: dict[str, int], message: str) -> None:
        """Write, log and print records on the first process."""
        if not trainer.is_global_zero:
            return
        path = Path(trainer.default_root_dir) / RECORDS
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.writelines(json.dumps(record) + "\n" for record in sorted(records, key=lambda record: record["step"]))
        if trainer.logger is not None:
            values = {f"guard/{name}": float(count) for name, count in counts.items()}
            trainer.logger.log_metrics(values, trainer.global_step)
        rank_zero_warn(f"{message}; see {path}")

    def failure(self, trainer: Trainer, first_bad: int) -> str:
        """Return the reason why training ended, for error messages."""
        return (
            f"loss or gradient was not finite in {self.max_in_a_row} steps one after another, from step {first_bad} on "
            f"(callbacks.NonFiniteGuard max_in_a_row={self.max_in_a_row}, rollbacks={self.rollback.limit}). They were "
            f"skipped, so the weights are unchanged since then{self.remedy(trainer)}"
        )

    def remedy(self, trainer: Trainer) -> str:
        """Return the newest checkpoint and the remedy, for error messages."""
        found = complete_checkpoints(trainer.default_root_dir)
        newest = f"The newest checkpoint is {found[-1]}" if found else "There is no checkpoint"
        return (
            f". {newest}; the samples of skipped steps are in {trainer.default_root_dir}/{RECORDS}. Continue with "
            "--ckpt_path last and a lower learning rate, another model.init_args.seed, or --trainer.precision 32-true"
        )
