"""Steps that are skipped because loss or gradient is not finite, and losses far above the usual ones."""

import json
import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from maetok.checkpoints import complete_checkpoints
from maetok.distributed import gather_over_ranks
from maetok.step_guard import StepGuard, Verdict, all_finite

RECORDS = "unusual_steps.jsonl"
OPTIMIZERS = ("generator", "discriminator")


class NonFiniteError(RuntimeError):
    """Training cannot go on; the checkpoints that were written before are good."""


@dataclass
class Step:
    """What is kept of a step until it is looked at."""

    number: int
    verdicts: dict[int, Verdict]
    batches: list[dict[str, Any]]


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

    There is no automatic return to an older checkpoint: masks, noise and data are functions of seed and step, so the
    same steps would fail again. Continue with ``--ckpt_path last`` and another ``model.init_args.seed`` or a lower
    learning rate instead.

    Args:
        max_in_a_row: so many skipped steps one after another end training.
        check_every_n_steps: steps after which the verdicts are looked at, which waits for the GPU; skipping itself does
            not. Also before every checkpoint.
        spike_threshold: robust standard deviations above the median from which on a loss is a spike.
        spike_window: number of last steps that it is compared with.

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(
        self,
        max_in_a_row: int = 10,
        check_every_n_steps: int = 10,
        spike_threshold: float = 8.0,
        spike_window: int = 200,
    ) -> None:
        if min(max_in_a_row, check_every_n_steps, spike_window) < 1 or not spike_threshold > 0:
            raise ValueError(
                f"NonFiniteGuard: max_in_a_row={max_in_a_row}, check_every_n_steps={check_every_n_steps}, "
                f"spike_window={spike_window} and spike_threshold={spike_threshold} must all be positive"
            )
        self.max_in_a_row, self.check_every_n_steps = max_in_a_row, check_every_n_steps
        self.spike_threshold, self.history = spike_threshold, LossHistory(spike_window)
        self.skipped_steps, self.in_a_row, self.loss_spikes = 0, 0, 0
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
        """Keep what identifies the batch; look at the steps when enough have come together."""
        self.batches.append({name: batch[name] for name in ("indices", "position") if name in batch})
        if trainer.global_step == self.last_step:
            return  # one of several micro-batches
        self.last_step = trainer.global_step
        self.pending.append(Step(self.last_step, pl_module.step_guard.verdicts, self.batches))
        self.batches = []
        if len(self.pending) >= self.check_every_n_steps:
            self.check(trainer)

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
            "losses": list(self.history.losses),
        }

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Go on with counts and losses; a checkpoint of a run without guard has none."""
        state = checkpoint.get("non_finite_guard")
        if state is not None:
            self.skipped_steps, self.in_a_row = state["skipped_steps"], state["in_a_row"]
            self.loss_spikes = state["loss_spikes"]
            self.history.losses.extend(state["losses"])

    def check(self, trainer: Trainer) -> None:
        """Count, write and log what the steps since the last check were like. All processes call this together.

        Raises:
            NonFiniteError: on all processes, if ``max_in_a_row`` steps one after another were skipped.
        """
        steps, self.pending = self.pending, []
        verdicts = [(verdict.skipped, verdict.loss) for step in steps for verdict in step.verdicts.values()]
        numbers = iter(torch.stack([value for pair in verdicts for value in pair]).tolist() if verdicts else [])
        bad, records, longest = [], [], 0
        for step in steps:
            values = {index: (next(numbers), next(numbers)) for index in step.verdicts}
            skipped = [OPTIMIZERS[index] for index, (skip, _) in values.items() if skip]
            self.in_a_row = self.in_a_row + 1 if skipped else 0
            longest = max(longest, self.in_a_row)
            if skipped:
                bad.append((step, {"event": "non_finite", "step": step.number, "skipped": skipped}))
            elif record := self.spike(step, values[0][1]):
                records.append(record)
        self.skipped_steps, self.loss_spikes = self.skipped_steps + len(bad), self.loss_spikes + len(records)
        if bad:  # the same on all processes
            records += described(bad)
        self.report(trainer, records, len(bad))
        if longest >= self.max_in_a_row:
            raise NonFiniteError(
                f"loss or gradient was not finite in {longest} steps one after another, up to step {self.last_step} "
                f"(callbacks.NonFiniteGuard max_in_a_row={self.max_in_a_row}). They were skipped, so the weights are "
                f"those of before{self.remedy(trainer)}"
            )

    def spike(self, step: Step, loss: float) -> dict[str, Any] | None:
        """Add the loss of a step to the history; a record of it if it is a spike."""
        median, deviations = self.history.add(loss)
        if deviations < self.spike_threshold:
            return None
        record = {"event": "loss_spike", "step": step.number, "loss": loss, "median": median, "deviations": deviations}
        return record | {"position": position_of(step)}

    def report(self, trainer: Trainer, records: list[dict[str, Any]], skipped: int) -> None:
        """Write and log on the first process."""
        if not records or not trainer.is_global_zero:
            return
        path = Path(trainer.default_root_dir) / RECORDS
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.writelines(json.dumps(record) + "\n" for record in sorted(records, key=lambda record: record["step"]))
        if trainer.logger is not None:
            counts = {"guard/skipped_steps": self.skipped_steps, "guard/loss_spikes": self.loss_spikes}
            trainer.logger.log_metrics({name: float(count) for name, count in counts.items()}, trainer.global_step)
        rank_zero_warn(
            f"up to step {self.last_step}: {skipped} steps skipped because loss or gradient was not finite, "
            f"{len(records) - skipped} loss spikes; see {path}"
        )

    def remedy(self, trainer: Trainer) -> str:
        """What is left, and what to do, for error messages."""
        found = complete_checkpoints(trainer.default_root_dir)
        newest = f"The newest checkpoint is {found[-1]}" if found else "There is no checkpoint"
        return (
            f". {newest}; the samples of skipped steps are in {trainer.default_root_dir}/{RECORDS}. Continue with "
            "--ckpt_path last and a lower learning rate, another model.init_args.seed, or --trainer.precision 32-true"
        )


def described(bad: Iterable[tuple[Step, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Records of skipped steps, completed by what all processes know of them; collective."""
    bad = list(bad)
    own = []
    for step, _ in bad:
        losses = {
            OPTIMIZERS[index]: [number(loss) for loss in verdict.own_losses.tolist()]
            for index, verdict in step.verdicts.items()
        }
        indices = [batch["indices"].tolist() for batch in step.batches if "indices" in batch]
        own.append({"losses": losses, "indices": indices})
    processes = gather_over_ranks(own)
    return [
        record
        | {
            "gradient_norms": {OPTIMIZERS[i]: number(float(v.gradient_norm)) for i, v in step.verdicts.items()},
            "position": position_of(step),
            "processes": [process[place] for process in processes],
        }
        for place, (step, record) in enumerate(bad)
    ]


def position_of(step: Step) -> int | None:
    """Position in the data order after the step, over all processes."""
    position = step.batches[-1].get("position") if step.batches else None
    return None if position is None else int(position)


def number(value: float) -> float | str:
    """A float, or what JSON has no number for as a word: nan, inf, -inf."""
    return value if math.isfinite(value) else str(value)
