"""A killed and continued run equals an uninterrupted one under any strategy; checkpoints fit all strategies."""

import json
import math
from pathlib import Path
from typing import Literal

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from maetok import Tokenizer
from maetok.checkpoints.consolidate import main
from maetok.checkpoints.files import read_checkpoint, read_weights, split, stored_tensors
from maetok.checkpoints.runs import InitFrom, complete_checkpoints
from tests.support.helpers import run_module
from tests.support.strategies.runs import build, optimization, tokenizer
from tools.plan.state import expected_bytes, size_of, trained_networks

WHOLE = "1-fsdp-whole"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, digits_root: Path) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    run_module("tests.support.strategies.resume", folder, str(digits_root))
    return folder


def result(folder: Path) -> tuple[dict[str, Tensor], int]:
    return torch.load(folder / "result.pt")


def journal(folder: Path) -> list[list[dict[str, float]]]:
    """Return the values that each micro-batch logged on each process."""
    return [[json.loads(line) for line in path.read_text().splitlines()] for path in sorted(folder.glob("scalars.*"))]


@pytest.mark.parametrize("kind", ["1-ddp", "1-fsdp", "2-ddp", "2-fsdp", "3-ddp", "3-fsdp-async"])
def test_a_killed_run_continues_bit_for_bit(runs: Path, kind: str) -> None:
    """SIGKILL arrives between the micro-batches of step 3 of 4, after the checkpoint of step 2."""
    whole, parts = (runs / f"{kind}-{name}" for name in ("whole", "parts"))
    expected, found = journal(whole), journal(parts)
    assert len(expected) == len(found) == 2
    for one, other in zip(expected, found, strict=True):
        assert [values["step"] for values in one] == [0, 1, 1, 2, 2, 3, 3, 4]
        assert [values["step"] for values in other][:5] == [0, 1, 1, 2, 2]
        assert [values["step"] for values in other][5:] == [2, 3, 3, 4]  # the first micro-batch of step 3 runs again
        for uninterrupted, continued in zip(one[:5] + one[4:], other, strict=True):
            common = uninterrupted.keys() & continued.keys()  # some values are not logged again right after a restart
            assert "train/loss" in common
            assert {name: uninterrupted[name] for name in common} == {name: continued[name] for name in common}
    (weights, _), (again, _) = result(whole), result(parts)
    assert weights.keys() == again.keys()
    assert all(torch.equal(weights[name], again[name]) for name in weights)


@pytest.mark.parametrize(
    "way",
    ["fsdp-to-single", "fsdp-to-ddp", "fsdp-to-fsdp-4", "fsdp-to-hsdp-4", "single-to-fsdp", "fsdp-file-to-single"],
)
def test_another_strategy_and_number_of_processes_continue(runs: Path, way: str) -> None:
    """After the change, two steps of AdamW at a learning rate of 1e-3 differ only by rounding (seen: 1.2e-7)."""
    expected, found = result(runs / WHOLE)[0], result(runs / f"from-{way}")[0]
    assert expected.keys() == found.keys()
    assert max((found[name] - value).abs().max().item() for name, value in expected.items()) < 1e-5
    start = build(1).state_dict()
    assert max((expected[name] - value).abs().max().item() for name, value in start.items()) > 1e-3


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_process_holds_half_of_what_it_holds_without_sharding(runs: Path, stage: int) -> None:
    """Count the bytes of parameters, averages and AdamW's states; both processes hold the whole discriminator."""
    sharded = result(runs / f"{stage}-fsdp{'-async' if stage == 3 else ''}-whole")[1]
    assert 0.5 <= sharded / result(runs / f"{stage}-ddp-whole")[1] <= 0.55


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_process_holds_what_was_planned(runs: Path, stage: int, strategy: Literal["ddp", "fsdp"]) -> None:
    """The plan is exact to the byte for parameters, averages and optimizer states; buffers are not measured."""
    adam = optimization("AdamW", 1e-3)
    networks = trained_networks(
        build(
            stage,
            **(
                {"optimization": adam}
                if stage == 3
                else {"autoencoder_optimization": adam, "discriminator_optimization": adam}
            ),
        )
    )
    planned = expected_bytes(networks, world_size=2, strategy=strategy)
    buffers = sum((1 + it.averages) * sum(size_of(buffer) for buffer in it.network.buffers()) for it in networks)
    held = result(runs / f"{stage}-{strategy}{'-async' if (stage, strategy) == (3, 'fsdp') else ''}-whole")[1]
    assert held == planned.parameters + planned.averages + planned.optimizer - buffers


def test_a_sharded_checkpoint_holds_everything_once(runs: Path, tmp_path: Path) -> None:
    folder, file = (complete_checkpoints(runs / name)[0] for name in ("begun-fsdp", "begun-fsdp-file"))
    assert folder.is_dir()
    assert file.is_file()
    stored = stored_tensors(folder)
    chunks = {name: [math.prod(chunk.sizes) for chunk in entry.chunks] for name, entry in stored.items()}
    assert all(sum(sizes) == math.prod(stored[name].size) for name, sizes in chunks.items())
    assert {len(sizes) for sizes in chunks.values()} == {1, 2}  # whole or halved
    places = dcp.FileSystemReader(folder).read_metadata().storage_data
    assert len(places) == sum(map(len, chunks.values()))
    assert {place.relative_path for place in places.values()} == {"__0_0.distcp", "__1_0.distcp"}
    read, single = read_checkpoint(folder), read_checkpoint(file)
    assert read.keys() == single.keys()
    (tensors, _), (others, _) = split(read), split(single)
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensors[name], value) for name, value in others.items())
    assert {name.split(".")[0] for name in tensors} == {"state_dict", "optimizer_states"}
    main([f"--ckpt={runs / 'begun-fsdp'}", f"--output={tmp_path / 'one.ckpt'}"])
    consolidated, _ = split(read_checkpoint(tmp_path / "one.ckpt"))
    assert all(torch.equal(consolidated[name], value) for name, value in others.items())
    with pytest.raises(FileExistsError, match=r"--output=.*one\.ckpt exists already"):
        main([f"--ckpt={runs / 'begun-fsdp'}", f"--output={tmp_path / 'one.ckpt'}"])


def test_weights_of_a_sharded_checkpoint_begin_another_run(runs: Path) -> None:
    path = complete_checkpoints(runs / "begun-fsdp")[0]
    network, weights = tokenizer(), read_weights(path)
    for source in (path, runs / "begun-fsdp"):
        InitFrom(str(source)).load(network)
        for name, value in network.state_dict().items():
            assert torch.equal(value, weights[f"ema.network.tokenizer.{name}"])
    with pytest.raises(ValueError, match=r"prefix='none\.': .* has no such weights, but"):
        InitFrom(str(path), "none.").load(network)
    assert isinstance(network, Tokenizer)
