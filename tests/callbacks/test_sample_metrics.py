"""Samples are class-balanced, agree with the command on files, and do not depend on the number of processes."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import Trainer

from callbacks import RunReport, SampleMetrics
from maetok.metrics import EfficientNetLite0Features, to_uint8
from maetok.metrics.__main__ import main as measure_files
from main import main
from tests.support.fakes import Task, validating
from tests.support.feature_networks import MeanColours, SmallInception, pictures
from tests.support.helpers import EXPERIMENTS, ROOT, run_subprocess
from tests.support.measured_tasks import Painter
from tests.support.shards import image_shards, write_shards


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write shards, and reference images with moments of another network."""
    folder = tmp_path_factory.mktemp("samples")
    write_shards(folder, [4], split="validation")
    moments = {"mu": np.zeros(6), "sigma": np.eye(6)}
    np.savez(folder / "real.npz", arr_0=pictures(340, seed=2).permute(0, 2, 3, 1).numpy(), **moments)
    return folder


def validate(folder: Path, output: Path, callback: SampleMetrics, subcommand: str = "validate", **options: Any) -> dict:
    """Return what a subcommand logged, and the last record that it wrote."""
    trainer = Trainer(
        default_root_dir=output, logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[callback, RunReport()], accelerator="cpu", use_distributed_sampler=False,
        **({"devices": 1} | options),
    )  # fmt: skip
    getattr(trainer, subcommand)(Painter(), datamodule=image_shards(folder, stage=None), verbose=False)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return {"logged": logged} | json.loads((output / "metrics.json").read_text())[-1]


@pytest.mark.parametrize("subcommand", ["validate", "test"])
def test_it_measures_what_the_command_measures_on_files(folder: Path, tmp_path: Path, subcommand: str) -> None:
    features, real = EfficientNetLite0Features(32), folder / "real.npz"
    callback = SampleMetrics(features, str(real), num_classes=3, samples=330, guidance_scale=1.5, batch_size=100)
    found = validate(folder, tmp_path, callback, subcommand)
    indices = torch.arange(330)
    images = to_uint8(Painter().sample(indices % 3, indices, 1.5)).permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "samples.npz", arr_0=images, labels=indices.numpy() % 3)
    arguments = ["--protocol=gfid-adm", f"--samples={tmp_path / 'samples.npz'}", f"--reference={real}"]
    measured = measure_files([*arguments, "--feature-size=32", "--device=cpu"])
    assert (found["hash"], found["protocol"]) == (measured.hash, "gfid-adm@330,references=340,statistics=images")
    assert found["metrics"].keys() == {"fd", "precision", "recall"}
    assert found["metrics"] == pytest.approx(dict(measured.values), rel=1e-5)
    assert found["logged"]["validation/sample_fd"] == pytest.approx(measured.values["fd"], rel=1e-5)
    assert not any("fid" in name for name in found["logged"])
    assert (found["subcommand"], found["step"], found["guidance_scale"]) == (subcommand, 7, 1.5)


PROGRAM = """
import sys
from pathlib import Path
from callbacks import SampleMetrics
from tests.callbacks.test_sample_metrics import validate
from tests.support.feature_networks import SmallInception
callback = SampleMetrics(SmallInception(), sys.argv[1] + "/real.npz", 3, samples=61, batch_size=9)
validate(Path(sys.argv[1]), Path(sys.argv[2]), callback, devices=2, strategy="ddp")
"""


def test_two_processes_measure_what_one_does_and_inception_gives_a_gfid(folder: Path, tmp_path: Path) -> None:
    run_subprocess(PROGRAM, tmp_path, str(folder), str(tmp_path / "two"))
    callback = SampleMetrics(SmallInception(), str(folder / "real.npz"), 3, samples=61, batch_size=9)
    one = validate(folder, tmp_path / "one", callback)
    (two,) = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert (two["hash"], two["samples"], two["references"]) == (one["hash"], 61, 340)
    assert two["protocol"] == "gfid-adm@61,references=340"  # Inception uses the moments of the file
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-9)
    assert one["logged"]["validation/gfid"] == pytest.approx(one["metrics"]["fid"], rel=1e-6)
    assert one["logged"]["validation/inception_score"] == pytest.approx(one["metrics"]["inception_score"])


def test_what_an_earlier_validation_found_is_forgotten(tmp_path: Path) -> None:
    old = {"validation/gfid": 3.0, "validation/recall": 0.5, "validation/diffusion_loss": 1.0}
    options = {"state": SimpleNamespace(fn="fit"), "global_step": 5, "callback_metrics": old}
    trainer, task = validating(torch.zeros(2, 3, 4, 4), torch.zeros(2), tmp_path, **options), Task()
    callback = SampleMetrics(MeanColours(), "nowhere", num_classes=3)
    callback.logged |= {"validation/gfid", "validation/recall"}
    callback.on_validation_epoch_end(trainer, task)
    assert list(old) == ["validation/diffusion_loss"]


def test_the_overlay_measures_the_published_fid(capsys: pytest.CaptureFixture[str]) -> None:
    overlay = f"--config={ROOT / 'configs' / 'overlay' / 'gfid.yaml'}"
    with pytest.raises(SystemExit):
        main(["validate", f"--config={EXPERIMENTS}/imagenet256_sit_xl.yaml", overlay, "--print_config"])
    attached = yaml.safe_load(capsys.readouterr().out)["trainer"]["callbacks"][-1]
    arguments = attached["init_args"]
    assert (attached["class_path"], arguments["samples"], arguments["num_classes"]) == (
        "callbacks.SampleMetrics", 50_000, 1000,
    )  # fmt: skip
    assert arguments["features"]["class_path"] == "maetok.metrics.InceptionFeatures"
