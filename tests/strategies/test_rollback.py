"""All processes return to the same checkpoint together: file or folder, sharded or not."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from maetok.checkpoints.files import read_checkpoint
from tests.support.helpers import run_module

PROCESSES = {"single": 1, "ddp": 2, "fsdp-async": 2, "from-folder": 1}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, digits_root: Path) -> Path:
    folder = tmp_path_factory.mktemp("rollback")
    run_module("tests.support.strategies.rollback", folder, str(digits_root))
    return folder


def results(folder: Path) -> list[Any]:
    """Return for each process the state after the rollback, final weights, rollbacks and learning rates."""
    return [torch.load(path) for path in sorted(folder.glob("?.pt"))]


def tensors(optimizers: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Return the tensors of optimizer states by optimizer, parameter and name."""
    return {
        f"{number}.{index}.{name}": value
        for number, optimizer in enumerate(optimizers)
        for index, state in optimizer["state"].items()
        for name, value in state.items()
    }


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("way", PROCESSES)
def test_every_process_has_what_the_checkpoint_holds(runs: Path, way: str) -> None:
    """Weights, averages, LeCAM and the states of both optimizers are bit-equal."""
    path = runs / way / "checkpoints" / "step=000000002.ckpt"
    assert path.is_dir() == (way in ("fsdp-async", "from-folder"))
    saved, later = read_checkpoint(path), read_checkpoint(path.with_name("step=000000004.ckpt"))
    found = results(runs / way)
    assert len(found) == PROCESSES[way]
    for (weights, optimizers), _, spans, _ in found:
        assert same(weights, saved["state_dict"])
        assert same(tensors(optimizers), tensors(saved["optimizer_states"]))
        assert not same(weights, later["state_dict"])
        assert spans == [[4, 5]]
    [record] = [it for it in map(json.loads, (runs / way / "unusual_steps.jsonl").open()) if it["event"] == "rollback"]
    assert record == {"event": "rollback", "step": 5, "first_bad": 4, "checkpoint": "step=000000002.ckpt"}


@pytest.mark.parametrize("way", PROCESSES)
def test_all_go_on_as_one_process(runs: Path, way: str) -> None:
    """After the rollback, two steps of AdamW at a learning rate of 1e-3 differ only by rounding (seen: 1.4e-7)."""
    [(_, expected, _, rates)] = results(runs / "single")
    for (after, _), weights, _, own_rates in results(runs / way):
        assert weights.keys() == expected.keys()
        assert max((weights[name] - value).abs().max().item() for name, value in expected.items()) < 1e-5
        assert max((weights[name] - value).abs().max().item() for name, value in after.items()) > 1e-3
        assert own_rates == rates == [1e-3, 1e-3]


def test_a_sharded_run_continues_after_the_rollback_bit_for_bit(runs: Path) -> None:
    """Continue from the checkpoint of step 6 alone."""
    whole, continued = results(runs / "fsdp-async"), results(runs / "continued")
    for (_, expected, spans, _), (_, weights, own_spans, _) in zip(whole, continued, strict=True):
        assert same(expected, weights)
        assert spans == own_spans == [[4, 5]]
