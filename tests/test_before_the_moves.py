"""Runs written before the renames of modules and keys continue to the weights that their own code reached.

``tests/data/before_the_moves`` holds the run directories of three stages after two steps, and the mean and norm of
every weight after two more steps of that code (``continued.json``).
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from maetok import SiT, Tokenizer
from maetok.checkpoints.files import read_checkpoint, read_weights
from maetok.checkpoints.networks import DENOISER, TOKENIZER
from maetok.hub.export import export
from main import main
from tests.conftest import STORED

OLD_RUNS = STORED / "before_the_moves"
EXPECTED = json.loads((OLD_RUNS / "continued.json").read_text())
STAGES = ("digits_tokenizer", "digits_decoder", "digits_sit")
STEPS = 4
NOT_TRAINED = ("encoder.", "bottleneck.")  # in stage 2; its average shares them


@pytest.fixture(scope="module")
def continued(digits_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Continue every stage from its old config and checkpoint, after the old runs of earlier stages."""
    root = tmp_path_factory.mktemp("old")
    shutil.copytree(OLD_RUNS, root / "runs")
    shutil.copytree(OLD_RUNS, root / "continued")
    (root / "data").mkdir()
    (root / "data" / "digits").symlink_to(digits_root)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        main(["predict", "--config=runs/digits_latents/config_predict.yaml"])
        for name in STAGES:
            with pytest.warns(FutureWarning, match=r"model\.init_args\.generator is now"):
                main(
                    [
                        "fit",
                        f"--config=runs/{name}/config.yaml",
                        "--ckpt_path=last",
                        f"--trainer.max_steps={STEPS}",
                        f"--trainer.default_root_dir=continued/{name}",
                    ]
                )
    return root / "continued"


def checkpoint(run: Path, step: int = STEPS) -> Path:
    return run / "checkpoints" / f"step={step:09d}.ckpt"


@pytest.mark.parametrize("name", STAGES)
def test_an_old_run_goes_on_as_its_own_code_did(continued: Path, name: str) -> None:
    weights = {
        key: value for key, value in read_weights(checkpoint(continued / name)).items() if value.is_floating_point()
    }
    left_out = {f"{TOKENIZER.averaged}{part}" for part in NOT_TRAINED} if name == "digits_decoder" else set()
    expected = {key: value for key, value in EXPECTED[name].items() if not key.startswith(tuple(left_out))}
    assert weights.keys() == expected.keys()
    for key, (mean, norm) in expected.items():
        value = weights[key].double()
        assert value.norm().item() == pytest.approx(norm, rel=1e-4, abs=1e-6), key
        assert value.mean().item() == pytest.approx(mean, rel=1e-3, abs=1e-5), key
    before = read_weights(checkpoint(OLD_RUNS / name, 2))
    assert any(not torch.equal(before[key], value) for key, value in weights.items())


@pytest.mark.parametrize(
    ("name", "record", "kind"),
    [
        ("digits_tokenizer", TOKENIZER, Tokenizer),
        ("digits_decoder", TOKENIZER, Tokenizer),
        ("digits_sit", DENOISER, SiT),
    ],
)
@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_old_and_continued_checkpoints_are_exported(
    continued: Path, tmp_path: Path, name: str, record: Any, kind: type[nn.Module], weights: str
) -> None:
    """An old checkpoint uses its config and the table of old tasks; a new one uses its own record."""
    for folder, ckpt in (("old", checkpoint(OLD_RUNS / name, 2)), ("new", checkpoint(continued / name))):
        export(ckpt, tmp_path / folder, weights=weights)
        exported = kind.from_pretrained(tmp_path / folder).state_dict()  # type: ignore[attr-defined]
        state = read_weights(ckpt)
        prefix = record.averaged if weights == "ema" else record.raw
        for key, value in exported.items():
            whole = f"{prefix}{key}" if f"{prefix}{key}" in state else f"{record.raw}{key}"
            assert torch.equal(value, state[whole]), key


def test_new_checkpoints_say_what_they_train(continued: Path) -> None:
    records = {name: read_checkpoint(checkpoint(continued / name))["networks"] for name in STAGES}
    assert [list(record) for record in records.values()] == [["tokenizer"], ["tokenizer"], ["denoiser"]]
    denoiser = records["digits_sit"]["denoiser"]
    assert denoiser["class_path"] == "maetok.SiT"
    assert (denoiser["init_args"]["latent_tokens"], denoiser["init_args"]["size"]["width"]) == (4, 16)
    assert (denoiser["raw"], denoiser["averaged"]) == ("denoiser.", "emas.0.network.")
