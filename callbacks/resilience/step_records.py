"""Steps that wait for a check, and the records of skipped steps."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from maetok.runtime.distributed import gather_over_ranks
from maetok.training.step_guard import Verdict

OPTIMIZERS = ("autoencoder", "discriminator")


@dataclass
class Step:
    """A step that waits for a check."""

    number: int
    verdicts: dict[int, Verdict]
    batches: list[dict[str, Any]]


def skipped_step_records(bad: Iterable[tuple[Step, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return records of skipped steps, with the values of all processes; collective."""
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
    """Return the position in the data order after the step, over all processes."""
    position = step.batches[-1].get("position") if step.batches else None
    return None if position is None else int(position)


def number(value: float) -> float | str:
    """Return a finite value as a float, and nan, inf and -inf as text, since JSON has no such numbers."""
    return value if math.isfinite(value) else str(value)
