"""One process, DDP, FSDP and HSDP on two processes train the same networks, in all three stages."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from lightning_modules import LatentEncoding
from tests.support.helpers import run_module
from tests.support.strategies.runs import build, tokenizer

Result = tuple[dict[str, Tensor], dict[str, Tensor], set[str], list[int], list[list[float]], dict[str, Any]]
"""Weights; gradient norms; dtypes; reductions and gradient norms of each micro-batch; evidence of switches."""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, digits_root: Path) -> dict[str, Result]:
    folder = tmp_path_factory.mktemp("equality")
    run_module("tests.support.strategies.equality", folder, str(digits_root))
    return {path.stem: torch.load(path) for path in folder.glob("*.pt")}


def distance(one: Result, other: Result) -> float:
    """Return the largest difference of any weight, including moving averages and buffers."""
    assert one[0].keys() == other[0].keys()
    return max(
        (one[0][name] - value).abs().max().item() for name, value in other[0].items() if value.is_floating_point()
    )


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_all_strategies_give_the_weights_of_one_process(results: dict[str, Result], stage: int) -> None:
    """Take three SGD steps of two micro-batches (seen: 9e-8). Under FSDP processes begin with different weights."""
    single = results[f"{stage}-single"]
    for name, result in results.items():
        if name.startswith(str(stage)) and not name.endswith("bf16"):
            assert distance(single, result) < 5e-7, name
            assert result[1].keys() == single[1].keys()
            for norm, value in single[1].items():
                torch.testing.assert_close(result[1][norm], value, rtol=1e-5, atol=0)
    start = build(stage).state_dict()
    assert max((single[0][name] - value).abs().max().item() for name, value in start.items()) > 1e-2


def test_processes_may_drop_different_numbers_of_patches(results: dict[str, Result]) -> None:
    """Each process pads to its own longest sequence. Under FSDP the blocks are compiled and recomputed."""
    single = results["drop-single"]
    assert not any(name.endswith("encoder.mask_token") for name in single[0])
    for name in ("drop-ddp", "drop-fsdp"):
        assert distance(single, results[name]) < 5e-7, name
    moved = (single[0][name] - value for name, value in results["1-single"][0].items() if name in single[0])
    assert max(difference.abs().max().item() for difference in moved) > 1e-2  # dropping patches changes the training


@pytest.mark.parametrize("stage", [1, 3])
def test_bfloat16_parameters_compute_and_float32_ones_are_kept(results: dict[str, Result], stage: int) -> None:
    """The weights differ from float32 by 1.1e-4 (seen), and the steps move them by 1e-2."""
    result = results[f"{stage}-bf16"]
    assert 1e-6 < distance(results[f"{stage}-single"], result) < 1e-3
    assert result[2] == {"torch.float32"}


def test_gradients_are_averaged_once_per_step(results: dict[str, Result]) -> None:
    """A step has two micro-batches. The denoiser has three units: two blocks, and one for all other weights.

    In stage 1 these are three units of encoder and decoder each, two of the auxiliary decoder, one of the bottleneck,
    and three rotary embeddings.
    """
    assert results["3-fsdp"][3] == [0, 3] * 3
    assert results["1-fsdp"][3] == [0, 12] * 3
    for step in range(3):
        first, second = results["3-ddp"][4][4 * step : 4 * step + 2]  # of both processes after the first micro-batch
        assert len(first) == len(second) > 20
        assert first != second


def test_switches_were_on(results: dict[str, Result]) -> None:
    """Six micro-batches call each block once forward and once to recompute.

    Stage 1 has five blocks (three in the runs that drop patches), stage 3 has two.
    """
    for name, mesh, checkpointed, compiled in (
        ("1-single", (), 0, False),
        ("1-fsdp", (2,), 0, False),
        ("1-hsdp", (2, 1), 0, False),
        ("1-switches", (2,), 2 * 5 * 6, False),
        ("drop-fsdp", (2,), 2 * 3 * 6, True),
        ("3-single", (), 0, False),
        ("3-switches", (2,), 2 * 2 * 6, True),
    ):
        switches = results[name][5]
        assert (switches["mesh"], switches["checkpointed"]) == (mesh, checkpointed), name
        assert (switches["graphs"] > 0) == compiled, name


def test_a_task_that_only_evaluates_runs_under_a_strategy_that_shards() -> None:
    assert is_overridden("configure_model", LatentEncoding(tokenizer()))  # Lightning requires this method
