"""Kill a run that saves in every step repeatedly, and continue it each time, for ``test_kills``."""

import json
import random
import signal
import sys
import time
from pathlib import Path

from callbacks.resilience.checkpointing import resolve_checkpoint
from maetok.checkpoints.files import read_checkpoint, split
from maetok.checkpoints.runs import complete_checkpoints, step_of
from tests.support.processes import Group, run_group
from tests.support.strategies.resume import KIND, train

STAGE = 3


def complete_steps(folder: Path) -> list[int]:
    """Return the steps of all complete checkpoints; check that each is readable and holds its step."""
    steps = []
    for path in complete_checkpoints(folder):
        checkpoint = read_checkpoint(path)
        tensors, _ = split(checkpoint)
        assert checkpoint["global_step"] == step_of(path)
        assert all(tensor.isfinite().all() for tensor in tensors.values())
        steps.append(step_of(path))
    return steps


def kill_at_random(group: Group, folder: Path, draw: random.Random, number: int) -> None:
    """Kill all processes after a first save: as the next checkpoint begins, shortly later, or at any time."""
    before = set(complete_checkpoints(folder))
    while set(complete_checkpoints(folder)) <= before and any(process.is_alive() for process in group.processes):
        time.sleep(0.001)
    while number % 3 < 2 and not list(folder.glob("checkpoints/.*.partial")):
        time.sleep(0.0002)
    time.sleep(draw.random() * (0.002, 0.05, 0.5)[number % 3])
    group.kill()


def main(folder: Path, digits: Path, kills: int, kind: str) -> None:
    """Kill, check and continue the given number of times, then finish; also run once without interruption."""
    draw, counts = random.Random(kills), {"killed": 0, "torn": 0}
    steps, whole, parts = 10 + 5 * kills, folder / "whole", folder / "parts"
    arguments = (digits, STAGE, kind, steps, -1, 1)
    for name in (whole, parts):
        name.mkdir()
    run_group(KIND[kind], train, whole, *arguments)
    newest = 0
    for number in range(kills):
        group = Group(KIND[kind], train, parts, *arguments)
        kill_at_random(group, parts, draw, number)
        counts["killed"] += any(process.exitcode == -signal.SIGKILL for process in group.processes)
        counts["torn"] += bool(list(parts.glob("checkpoints/.*.partial")))
        complete = complete_steps(parts)
        assert complete[-1] > newest, (complete, newest)  # the kill waited for a new checkpoint
        assert len(complete) >= min(2, complete[-1]), complete  # keep_last is 2
        newest = complete[-1]
        assert resolve_checkpoint("last", parts, "fit") == str(complete_checkpoints(parts)[-1])
    run_group(KIND[kind], train, parts, *arguments)
    assert not list(parts.glob("checkpoints/.*"))
    (folder / "counts.json").write_text(json.dumps(counts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
