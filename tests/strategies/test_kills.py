"""SIGKILL at random moments, mostly during the write of a checkpoint, loses no completed checkpoint."""

import json
from pathlib import Path

import pytest
import torch

from tests.support.helpers import run_module

slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("kind", "kills"),
    [("fsdp", 3), pytest.param("fsdp", 20, marks=slow), pytest.param("fsdp-async", 20, marks=slow),
     pytest.param("ddp", 20, marks=slow)],
)  # fmt: skip
def test_no_kill_loses_a_complete_checkpoint(tmp_path: Path, digits_root: Path, kind: str, kills: int) -> None:
    """After each kill the newest checkpoint is complete and newer; the final weights equal an uninterrupted run's."""
    run_module("tests.support.strategies.kills", tmp_path, str(digits_root), str(kills), kind, timeout=3600)
    counts = json.loads((tmp_path / "counts.json").read_text())
    assert counts["killed"] == kills
    assert counts["torn"] >= kills // 3  # killed during a write
    (whole, _), (parts, _) = (torch.load(tmp_path / name / "result.pt") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
