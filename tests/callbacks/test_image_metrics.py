"""The callback counts every valid sample once, agrees with the command, and writes records."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from lightning.pytorch import Trainer
from PIL import Image

from callbacks import ImageMetrics, ReconstructionMetrics, RunReport
from maetok.metrics import EfficientNetLite0Features, to_uint8
from maetok.metrics.__main__ import main as measure_files
from main import main
from tests.support.feature_networks import MeanColours, SmallInception
from tests.support.helpers import EXPERIMENTS, ROOT, run_subprocess
from tests.support.measured_tasks import Darker, write_bright_shards
from tests.support.shards import encoded, image_shards, write_shards, write_tar


def validate(
    folder: Path,
    output: Path,
    callback: ImageMetrics,
    subcommand: str = "validate",
    contrast: float = 1.0,
    **options: Any,
) -> dict[str, float]:
    """Run a subcommand on shards, and return what it logged."""
    trainer = Trainer(
        default_root_dir=output, logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[callback, ReconstructionMetrics(), RunReport()], accelerator="cpu", use_distributed_sampler=False,
        **({"devices": 1} | options),
    )  # fmt: skip
    data = image_shards(folder, stage=None, image_size=16, batch_size=4, max_fault_rate=0.5)
    getattr(trainer, subcommand)(Darker(contrast), datamodule=data, verbose=False)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def records(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "metrics.json").read_text())


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write eleven images, so that the last batch of four has one empty place."""
    folder = tmp_path_factory.mktemp("metrics") / "shards"
    write_bright_shards(folder, [5, 6])
    return folder


@pytest.mark.parametrize("subcommand", ["validate", "test"])
def test_distance_is_logged_and_written(shards: Path, tmp_path: Path, subcommand: str) -> None:
    logged = validate(shards, tmp_path, ImageMetrics(MeanColours()), subcommand)
    # only the mean changes, by a fifth in each of three channels
    assert logged["validation/reconstruction_fd"] == pytest.approx(3 * 0.2**2, rel=1e-5)
    (record,) = records(tmp_path)
    assert (record["protocol"], record["samples"], record["step"]) == ("rfid-val@11", 11, 7)
    assert (record["subcommand"], record["features"]) == (subcommand, "MeanColours()")
    assert record["metrics"]["fd"] == pytest.approx(0.12, rel=1e-5)
    assert record["metrics"]["psnr"] == pytest.approx(-20 * np.log10(0.2), rel=1e-5)
    assert record["unavailable"].keys() == {"sfid", "lpips"}
    report = json.loads((tmp_path / f"metrics_{subcommand}.jsonl").read_text())
    assert report["validation/reconstruction_fd"] == logged["validation/reconstruction_fd"]
    validate(shards, tmp_path, ImageMetrics(MeanColours()), subcommand)
    assert [found["hash"] for found in records(tmp_path)] == [record["hash"]] * 2


def test_only_inception_gives_an_rfid(shards: Path, tmp_path: Path) -> None:
    network = SmallInception()
    forward = network.forward
    network.forward = lambda images: forward(images[:, :, :8, :8])  # type: ignore[method-assign]
    logged = validate(shards, tmp_path, ImageMetrics(network))
    assert logged["validation/rfid"] > 0
    assert logged["validation/rsfid"] > 0
    assert "validation/reconstruction_fd" not in logged


def test_broken_images_are_left_out_and_limits_show_in_the_name(tmp_path: Path) -> None:
    write_bright_shards(tmp_path / "shards", [5])
    members = [("a.png", b"broken"), ("a.cls", b"0"), ("b.png", encoded((16, 16))), ("b.cls", b"0")]
    write_tar(tmp_path / "shards" / "validation-000001.tar", members)
    validate(tmp_path / "shards", tmp_path, ImageMetrics(MeanColours()))
    validate(tmp_path / "shards", tmp_path, ImageMetrics(MeanColours()), limit_val_batches=1)
    assert [record["protocol"] for record in records(tmp_path)] == ["rfid-val@6", "rfid-val@4"]


def test_a_sample_that_is_lost_is_an_error(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    callback = ImageMetrics(MeanColours())
    collect = callback.on_validation_batch_end

    def forget(trainer: Any, task: Any, outputs: Any, batch: Any, *numbers: int) -> None:
        collect(trainer, task, outputs, batch | {"valid": batch["valid"] & (batch["indices"] != 6)}, *numbers)

    monkeypatch.setattr(callback, "on_validation_batch_end", forget)
    with pytest.raises(ValueError, match=r"1 of 11 samples are missing, but 0 are known to be broken.*indices: 6\)"):
        validate(shards, tmp_path, callback)


@pytest.mark.parametrize(("step", "every", "expected"), [(5, 0, False), (10, 0, True), (5, 2, False), (4, 2, True)])
def test_fit_measures_at_the_end_and_where_asked(step: int, every: int, expected: bool) -> None:
    older = {"validation/reconstruction_fd": 1.0, "validation/psnr": 2.0}
    trainer = SimpleNamespace(
        sanity_checking=False, state=SimpleNamespace(fn="fit"), global_step=step, max_steps=10, callback_metrics=older,
        val_check_batch=1, lightning_module=None,
    )  # fmt: skip
    callback = ImageMetrics(MeanColours(), every_n_steps=every)
    callback.logged.add("validation/reconstruction_fd")  # as after an earlier validation
    callback.on_validation_epoch_start(trainer, Darker())
    assert (callback.evaluator is not None) == expected
    if not expected:
        callback.on_validation_batch_end(trainer, None, None, {}, 0)
        callback.on_validation_epoch_end(trainer, Darker())
        assert older == {"validation/psnr": 2.0}  # the value of an earlier validation is gone
    trainer.sanity_checking = True
    assert not callback.measures(trainer)


def test_command_on_files_measures_the_same(tmp_path: Path) -> None:
    """A distance in 320 features needs more images: 330."""
    write_shards(tmp_path / "shards", [330], split="validation")
    validate(tmp_path / "shards", tmp_path, ImageMetrics(EfficientNetLite0Features(32)), contrast=0.7)
    (record,) = records(tmp_path)
    data = image_shards(tmp_path / "shards", stage="validate", image_size=16, batch_size=330)
    images = data.on_after_batch_transfer(next(iter(data.val_dataloader())), 0)["images"]
    sides = {"images": to_uint8(images), "reconstructions": to_uint8(Darker(0.7).reconstruct(images))}
    for name, side in sides.items():
        arrays = side.permute(0, 2, 3, 1).numpy()
        np.savez(tmp_path / f"{name}.npz", arr_0=arrays)
        (tmp_path / name).mkdir()
        for number, pixels in enumerate(arrays):
            Image.fromarray(pixels).save(tmp_path / name / f"{number:03d}.png")
    for suffix in ("", ".npz"):
        paths = [f"--{side}={tmp_path / name}{suffix}" for side, name in
                 (("samples", "reconstructions"), ("reference", "images"))]  # fmt: skip
        measured = measure_files(["--protocol=rfid-val", "--feature-size=32", "--device=cpu", *paths]).record()
        assert measured["hash"] == record["hash"]
        assert measured["metrics"].keys() == {"fd", "psnr", "ssim"}
        for name, value in measured["metrics"].items():
            assert value == pytest.approx(record["metrics"][name], rel=1e-5)


PROGRAM = """
import sys
from pathlib import Path
from callbacks import ImageMetrics
from tests.callbacks.test_image_metrics import validate
from tests.support.feature_networks import MeanColours
validate(Path(sys.argv[1]), Path(sys.argv[2]), ImageMetrics(MeanColours()), contrast=0.7, devices=2, strategy="ddp")
"""


def test_two_processes_measure_and_write_what_one_does(shards: Path, tmp_path: Path) -> None:
    run_subprocess(PROGRAM, tmp_path, str(shards), str(tmp_path / "two"))
    validate(shards, tmp_path / "one", ImageMetrics(MeanColours()), contrast=0.7)
    (two,), (one,) = records(tmp_path / "two"), records(tmp_path / "one")
    assert two["samples"] == 11
    for name in ("psnr", "ssim"):  # the same numbers in the same order
        assert two["metrics"][name] == pytest.approx(one["metrics"][name], rel=1e-7)
    assert two["metrics"].pop("fd") == pytest.approx(one["metrics"].pop("fd"), rel=1e-6)
    assert two | {"metrics": {}} == one | {"metrics": {}}


def test_configs_measure_fd_and_the_overlay_adds_the_published_fid(capsys: pytest.CaptureFixture[str]) -> None:
    overlay = f"--config={ROOT / 'configs' / 'overlay' / 'rfid.yaml'}"
    for name in ("digits_tokenizer", "imagenet256_maetok_b128", "imagenet512_decoder"):
        with pytest.raises(SystemExit):
            main(["validate", f"--config={EXPERIMENTS / name}.yaml", overlay, "--print_config"])
        printed = yaml.safe_load(capsys.readouterr().out)["trainer"]["callbacks"]
        measuring = [entry["init_args"] for entry in printed if entry["class_path"] == "callbacks.ImageMetrics"]
        features = [arguments["features"]["class_path"].split(".")[-1] for arguments in measuring]
        assert features == ["EfficientNetLite0Features", "InceptionFeatures"]
        assert measuring[1]["features"]["init_args"]["weights_path"].startswith("weights/")
        assert measuring[1]["lpips"]["init_args"]["checkpoint_path"] == "weights/vgg16-397923af.pth"
