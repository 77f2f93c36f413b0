"""Networks that only the first process builds with values train as if every process had built them."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from lightning_modules.sampling import DenoiserFrom
from maetok import Tokenizer
from maetok.checkpoints.files import read_checkpoint, split
from maetok.checkpoints.runs import InitFrom
from maetok.networks import MaskedAutoencoder
from maetok.training.sharding import shard
from main import main
from strategies.meta_device import is_first_process
from tests.support.helpers import EXPERIMENTS, ROOT, TINY, run_module
from tests.support.strategies.meta_device import SAVED, STEPS
from tests.support.strategies.runs import denoiser, tokenizer

LAUNCHERS = ("TORCHELASTIC_RUN_ID", "RANK", "GROUP_RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_NTASKS", "SLURM_PROCID")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, digits_root: Path) -> Path:
    folder = tmp_path_factory.mktemp("meta_device")
    run_module("tests.support.strategies.meta_device", folder, str(digits_root))
    return folder


def tensors(folder: Path, step: int) -> dict[str, Tensor]:
    """Return the weights, averages, buffers and optimizer states of a checkpoint."""
    return split(read_checkpoint(folder / "checkpoints" / f"step={step:09d}.ckpt"))[0]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_switch_changes_no_bit(runs: Path, stage: int) -> None:
    """The frozen networks are random too, so all processes must take those of the first process."""
    whole, meta = (tensors(runs / f"{stage}-{name}", STEPS) for name in ("whole", "meta"))
    assert whole.keys() == meta.keys()
    assert all(torch.equal(meta[name], value) for name, value in whole.items())
    before = tensors(runs / f"{stage}-whole", SAVED)
    assert any(not torch.equal(before[name], value) for name, value in whole.items())


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_second_process_never_has_the_whole(runs: Path, stage: int) -> None:
    """Before sharding, the other process holds all values except those of the trained network and its averages."""
    for name, trained in (("meta", ["meta"]), ("whole", ["cpu"])):
        first, second = (json.loads((runs / f"{stage}-{name}" / f"devices.{rank}.json").read_text()) for rank in (0, 1))
        assert first == {"trained": ["cpu"], "others": ["cpu"]}
        assert second == {"trained": trained, "others": ["cpu"]}


def test_a_run_continues_on_the_meta_device(runs: Path) -> None:
    """The guide is a copy of the denoiser and is not sharded."""
    whole, continued = (tensors(runs / f"3-{name}", STEPS) for name in ("whole", "continued"))
    assert whole.keys() == continued.keys()
    assert all(torch.equal(continued[name], value) for name, value in whole.items())


@pytest.mark.parametrize(
    ("variables", "first"),
    [
        ({}, True),
        ({"LOCAL_RANK": "1"}, False),
        ({"NODE_RANK": "1"}, False),
        ({"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "1", "SLURM_PROCID": "1"}, True),
        ({"TORCHELASTIC_RUN_ID": "x", "RANK": "2", "LOCAL_RANK": "0", "GROUP_RANK": "0"}, False),
        ({"SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "4", "SLURM_PROCID": "0"}, True),
        ({"SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "4", "SLURM_PROCID": "2", "LOCAL_RANK": "0"}, False),
    ],
)
def test_launchers_say_which_process_is_first(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], first: bool
) -> None:
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert is_first_process() is first


@pytest.fixture
def only_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("only_process")
def test_the_first_process_needs_values() -> None:
    with torch.device("meta"):
        network = denoiser()
    with pytest.raises(ValueError, match=r"the first process has built the network on the meta device.*meta_device"):
        shard(network, init_device_mesh("cpu", (1,)), torch.device("cpu"))


def test_tasks_that_nobody_knows_are_refused(tmp_path: Path) -> None:
    arguments = [f"--config={EXPERIMENTS / 'digits_tokenizer.yaml'}", f"--config={TINY}"]
    arguments += [f"--config={ROOT / 'configs' / 'overlay' / 'fsdp.yaml'}", "--model=lightning_modules.LatentEncoding"]
    with pytest.raises(ValueError, match=r"meta_device=true, but model.class_path=lightning_modules.LatentEncoding"):
        main(["fit", *arguments, f"--trainer.default_root_dir={tmp_path}"])


def test_parts_are_built_where_the_network_is() -> None:
    with torch.device("meta"):
        network = tokenizer()
    built = MaskedAutoencoder(network, {"target": 12}, depth=1)
    assert {tensor.device.type for tensor in built.auxiliary_decoders.state_dict().values()} == {"meta"}


def test_files_are_compared_with_networks_on_the_meta_device(tmp_path: Path) -> None:
    """Published weights fit; only the first process loads the weights of a run, but every process loads a guide."""
    tokenizer().save_pretrained(tmp_path)
    with torch.device("meta"):
        network, other = Tokenizer.from_pretrained(tmp_path), denoiser()
    weights = denoiser().state_dict()
    torch.save({"state_dict": {f"x.{name}": value for name, value in weights.items()}}, tmp_path / "run.ckpt")
    assert InitFrom(str(tmp_path / "run.ckpt"), "x.").load(other)
    for built in (network, other):
        assert {tensor.device.type for tensor in built.state_dict().values()} == {"meta"}
    guide = DenoiserFrom(str(tmp_path / "run.ckpt"), "x.").loaded_copy(other)
    assert all(torch.equal(value, weights[name]) for name, value in guide.state_dict().items())
