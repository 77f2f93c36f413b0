"""Broken samples: counted over all processes, recorded, and if too many, the run stops on all processes at once."""

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
    """Raise TooManyFaultsError, with the first faults, if more than the allowed share of ``samples`` is broken."""
    if len(faults) > max_fault_rate * samples:
        counts = Counter(fault.reason for fault in faults)
        first = "".join(f"\n  {fault.shard} {fault.key!r}: {fault.reason}: {fault.detail}" for fault in faults[:10])
        raise TooManyFaultsError(
            f"{where}: {len(faults)} of {samples} samples are broken ({describe_counts(counts)}), more than "
            f"max_fault_rate={max_fault_rate} allows. Repair them, or raise max_fault_rate to leave them out. "
            f"The first are:{first}"
        )


def describe_counts(counts: dict[str, int]) -> str:
    """Return a list like ``corrupt_image 3, missing_label 1``."""
    return ", ".join(f"{reason} {count}" for reason, count in counts.items() if count)


class FaultMonitor:
    """Counts the samples and faults of this process; ``check`` sums and reports them over all processes.

    Args:
        max_fault_rate: largest allowed share of broken samples, among those read or in the data set if it is larger.
    """

    def __init__(self, max_fault_rate: float) -> None:
        self.max_fault_rate = max_fault_rate
        self.samples = 0
        self.found: list[Fault] = []
        self.known: set[Fault] = set()
        self.total_samples = 0
        self.totals = dict.fromkeys(REASONS, 0)

    def add(self, samples: int, faults: Sequence[Fault]) -> None:
        """Count the samples and faults of one batch of this process."""
        self.samples += samples
        self.found += faults

    def check(self, trainer: Any, data_set_samples: int) -> None:
        """Sum over all processes, log, record, and stop if there are too many faults. All processes must call this.

        The logger receives the scalars ``data/faults`` and ``data/faults_<reason>``. Every broken sample that is new to
        its process becomes a line of ``data_faults.jsonl`` in the run directory.

        Raises:
            TooManyFaultsError: on all processes together, because a process that stops alone leaves the others waiting.
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
        """Log the totals; in training, for the step that uses the current batch."""
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
                f"than data.init_args.max_fault_rate={self.max_fault_rate} of {samples}. See the list in "
                f"{trainer.default_root_dir}/data_faults.jsonl: repair or remove them, or raise max_fault_rate"
            )


def gathered(faults: list[Fault]) -> list[Fault]:
    """Return the faults of all processes, each once."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return faults
    parts: list[list[Fault]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(parts, faults)
    return list(dict.fromkeys(Fault(*fault) for part in parts for fault in part))
