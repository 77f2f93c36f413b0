"""Broken samples: counted over all processes, written down, and too many of them end the run everywhere at once."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from datamodules.shards import REASONS, Fault, ShardError


class TooManyFaultsError(ShardError):
    """More samples are broken than the configuration allows."""


def check_fault_rate(faults: Sequence[Fault], samples: int, max_fault_rate: float, where: str) -> None:
    """Raise TooManyFaultsError if more than the allowed share of ``samples`` is broken; lists the first of them."""
    if len(faults) > max_fault_rate * samples:
        counts = Counter(fault.reason for fault in faults)
        first = "".join(f"\n  {fault.shard} {fault.key!r}: {fault.reason}: {fault.detail}" for fault in faults[:10])
        raise TooManyFaultsError(
            f"{where}: {len(faults)} of {samples} samples are broken ({describe_counts(counts)}), more than "
            f"max_fault_rate={max_fault_rate} allows. Repair them, or raise max_fault_rate to leave them out. "
            f"The first are:{first}"
        )


def describe_counts(counts: dict[str, int]) -> str:
    """``corrupt_image 3, missing_label 1``."""
    return ", ".join(f"{reason} {count}" for reason, count in counts.items() if count)


class FaultMonitor:
    """Counts samples and faults that this process meets; ``check`` adds up and reports those of all processes.

    Args:
        max_fault_rate: largest allowed share of broken samples, of those read or of the data set if that is larger.
    """

    def __init__(self, max_fault_rate: float) -> None:
        self.max_fault_rate = max_fault_rate
        self.samples = 0
        self.found: list[Fault] = []
        self.known: set[Fault] = set()
        self.total_samples = 0
        self.totals = dict.fromkeys(REASONS, 0)

    def add(self, samples: int, faults: Sequence[Fault]) -> None:
        """Note what one batch of this process brought."""
        self.samples += samples
        self.found += faults

    def check(self, trainer: Any, data_set_samples: int) -> None:
        """Add up over all processes, log, write down, and stop if there are too many. All processes must call this.

        Scalars ``data/faults`` and ``data/faults_<reason>`` go to the logger; every broken sample that is new to its
        process becomes a line of ``data_faults.jsonl`` in the run directory.

        Raises:
            TooManyFaultsError: on all processes together, for one that stops alone leaves the others waiting.
        """
        counts = Counter(fault.reason for fault in self.found)
        numbers = torch.tensor([self.samples, *(counts[reason] for reason in REASONS)])
        strategy = trainer.strategy
        sums = strategy.reduce(numbers.to(strategy.root_device), reduce_op="sum").tolist()
        new = [fault for fault in dict.fromkeys(self.found) if fault not in self.known]
        self.known.update(new)
        self.samples, self.found = 0, []
        self.total_samples += int(sums[0])
        for reason, count in zip(REASONS, sums[1:], strict=True):
            self.totals[reason] += int(count)
        if sum(sums[1:]):
            self.write(trainer, gathered(new))
        self.log(trainer)
        self.stop_if_too_many(trainer, data_set_samples)

    def write(self, trainer: Any, faults: Sequence[Fault]) -> None:
        """Append faults to ``data_faults.jsonl``, on the first process."""
        if trainer.is_global_zero:
            path = Path(trainer.default_root_dir) / "data_faults.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                for fault in faults:
                    file.write(json.dumps({"step": trainer.global_step, **fault._asdict()}) + "\n")

    def log(self, trainer: Any) -> None:
        """Send the totals to the logger, in training for the step that uses the batch at hand."""
        if trainer.logger is not None and (trainer.training or sum(self.totals.values())):
            scalars = {f"data/faults_{reason}": float(count) for reason, count in self.totals.items() if count}
            scalars["data/faults"] = float(sum(self.totals.values()))
            trainer.logger.log_metrics(scalars, step=trainer.global_step + int(trainer.training))

    def stop_if_too_many(self, trainer: Any, data_set_samples: int) -> None:
        """Raise TooManyFaultsError if the allowed share is exceeded."""
        count, samples = sum(self.totals.values()), max(self.total_samples, data_set_samples)
        if count > self.max_fault_rate * samples:
            raise TooManyFaultsError(
                f"{count} broken samples ({describe_counts(self.totals)}) in {self.total_samples} that were read: more "
                f"than data.init_args.max_fault_rate={self.max_fault_rate} of {samples}. They are listed in "
                f"{trainer.default_root_dir}/data_faults.jsonl: repair or remove them, or raise max_fault_rate"
            )


def gathered(faults: list[Fault]) -> list[Fault]:
    """The faults of all processes, each once."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return faults
    parts: list[list[Fault]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(parts, faults)
    return list(dict.fromkeys(Fault(*fault) for part in parts for fault in part))
