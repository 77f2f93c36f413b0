"""Steps that are skipped because loss or gradient is not finite, and losses far above the usual ones."""

import json
from collections import deque
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from callbacks.resilience.rollback import Rollback
from callbacks.resilience.step_records import OPTIMIZERS, Step, position_of, skipped_step_records
from maetok.checkpoints.runs import complete_checkpoints
from maetok.training.step_guard import StepGuard, all_finite

RECORDS = "unusual_steps.jsonl"


class NonFiniteError(RuntimeError):
    """Training cannot go on; the checkpoints that were written before are good."""


class LossHistory:
    """Tells how unusual a loss is, by median and median absolute deviation, which single outliers do not move.

    Args:
        window: number of last losses that are compared with; nothing is unusual before there are a quarter of them.
    """

    def __init__(self, window: int) -> None:
        self.losses: deque[float] = deque(maxlen=window)

    def add(self, loss: float) -> tuple[float, float]:
        """Median of the losses before this one, and by how many standard deviations it lies above that median.

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
    """Has the task skip steps with a loss or gradient that is not finite, and says so.

    Every skipped step is a line of ``unusual_steps.jsonl`` in the run directory, with the losses and sample indices of
    all its micro-batches on all processes; a loss spike is one with the position in the data order. Both are counted
    (``guard/skipped_steps`` and ``guard/loss_spikes`` in the log), also over restarts. No checkpoint is written of
    weights that are not finite.

    After ``max_in_a_row`` skipped steps training ends, or up to ``rollbacks`` times it goes back: weights, moving
    averages, buffers and optimizer states are those of the newest checkpoint from before these steps again, and
    everything else goes on, so other batches, masks and noise follow (:mod:`callbacks.resilience.rollback`). It goes
    back only after steps that are multiples of ``check_every_n_steps``, so a continued run does so where an
    uninterrupted one does; training that ends before is over without. Each rollback is a line of the same file and
    counted (``guard/rollbacks``).

    Args:
        max_in_a_row: so many skipped steps one after another end training, or have it go back.
        check_every_n_steps: the verdicts are looked at after multiples of this, which waits for the GPU; skipping
            itself does not. Also before every checkpoint.
        spike_threshold: robust standard deviations above the median from which on a loss is a spike.
        spike_window: number of last steps that it is compared with.
        rollbacks: how often one run, over all its restarts, may go back instead of ending. Needs checkpoints of
            :class:`callbacks.ResumableCheckpoint` from before the skipped steps, so ``keep_last`` must outlast them.

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(
        self,
        max_in_a_row: int = 10,
        check_every_n_steps: int = 10,
        spike_threshold: float = 8.0,
        spike_window: int = 200,
        rollbacks: int = 0,
    ) -> None:
        if min(max_in_a_row, check_every_n_steps, spike_window) < 1 or not spike_threshold > 0 or rollbacks < 0:
            raise ValueError(
                f"NonFiniteGuard: max_in_a_row={max_in_a_row}, check_every_n_steps={check_every_n_steps}, "
                f"spike_window={spike_window} and spike_threshold={spike_threshold} must all be positive, "
                f"rollbacks={rollbacks} not negative"
            )
        self.max_in_a_row, self.check_every_n_steps = max_in_a_row, check_every_n_steps
        self.spike_threshold, self.history = spike_threshold, LossHistory(spike_window)
        self.skipped_steps, self.in_a_row, self.loss_spikes = 0, 0, 0
        self.first_bad: int | None = None  # of too many in a row, until training has gone back
        self.rollback = Rollback(rollbacks)
        self.pending: list[Step] = []
        self.batches: list[dict[str, Any]] = []
        self.last_step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the task the guard that skips."""
        if stage == "fit":
            pl_module.step_guard = StepGuard()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count from the step of the checkpoint."""
        self.last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep what identifies the batch; look at the steps when enough have come together, and go back if need be."""
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
        """Look at the last steps; the checkpoint of the last one comes after this."""
        self.check(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the counts and the last losses, after looking at all steps and weights.

        Raises:
            NonFiniteError: on all processes, if the weights of any are not finite or too many steps were skipped.
        """
        self.check(trainer)
        if not all_finite(chain(pl_module.parameters(), pl_module.buffers())):
            raise NonFiniteError(
                f"weights are not finite at step {trainer.global_step}, so no checkpoint of them is written"
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
        """Go on with counts and losses; a checkpoint of a run without guard has none."""
        state = checkpoint.get("non_finite_guard")
        if state is not None:
            self.skipped_steps, self.in_a_row = state["skipped_steps"], state["in_a_row"]
            self.loss_spikes, self.first_bad = state["loss_spikes"], state.get("first_bad")
            self.rollback.spans = state.get("rollbacks", [])  # of versions without rollback: none
            self.history.losses.extend(state["losses"])

    def check(self, trainer: Trainer) -> None:
        """Count, write and log what the steps since the last check were like. All processes call this together.

        Raises:
            NonFiniteError: on all processes, if ``max_in_a_row`` steps one after another were skipped and no rollback
                is left.
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
        """Train on from the weights of before the step ``first_bad``. All processes call this together.

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
            f"{self.max_in_a_row} steps from step {first_bad} on were skipped: training goes on after step "
            f"{self.last_step} with the weights of {path.name}; {self.rollback.left} rollbacks are left",
        )

    def spike(self, step: Step, loss: float) -> dict[str, Any] | None:
        """Add the loss of a step to the history; a record of it if it is a spike."""
        median, deviations = self.history.add(loss)
        if deviations < self.spike_threshold:
            return None
        record = {"event": "loss_spike", "step": step.number, "loss": loss, "median": median, "deviations": deviations}
        return record | {"position": position_of(step)}

    def report(self, trainer: Trainer, records: list[dict[str, Any]], counts: dict[str, int], message: str) -> None:
        """Write, log and print on the first process."""
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
        """What has ended training, for error messages."""
        return (
            f"loss or gradient was not finite in {self.max_in_a_row} steps one after another, from step {first_bad} on "
            f"(callbacks.NonFiniteGuard max_in_a_row={self.max_in_a_row}, rollbacks={self.rollback.limit}). They were "
            f"skipped, so the weights are those of before{self.remedy(trainer)}"
        )

    def remedy(self, trainer: Trainer) -> str:
        """What is left, and what to do, for error messages."""
        found = complete_checkpoints(trainer.default_root_dir)
        newest = f"The newest checkpoint is {found[-1]}" if found else "There is no checkpoint"
        return (
            f". {newest}; the samples of skipped steps are in {trainer.default_root_dir}/{RECORDS}. Continue with "
            "--ckpt_path last and a lower learning rate, another model.init_args.seed, or --trainer.precision 32-true"
        )
