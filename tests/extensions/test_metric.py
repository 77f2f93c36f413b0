"""A metric from another file is one config line: it is measured, logged and written, on any number of processes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, Trainer

from maetok.metrics import MeanOverPairs
from maetok.metrics.__main__ import main as measure_files
from maetok.metrics.evaluator import ImageEvaluator
from maetok.metrics.protocols import RFID_VAL, EvaluationProtocol
from tests.extensions.metric import BrightnessGap
from tests.support.feature_networks import MeanColours, pictures
from tests.support.measured_tasks import LEVELS, Darker, Painter, write_bright_shards
from tests.support.processes import run_group
from tests.support.shards import image_shards

LINE = [{"class_path": "tests.extensions.metric.BrightnessGap"}]


def from_config(class_name: str, **arguments: Any) -> Callback:
    """Return the callback that a section of a config makes."""
    parser = ArgumentParser()
    parser.add_argument("--callback", type=Callback)
    features = {"class_path": "tests.support.feature_networks.MeanColours"}
    section = {
        "class_path": f"callbacks.{class_name}",
        "init_args": {"features": features, "metrics": LINE} | arguments,
    }
    return parser.instantiate_classes(parser.parse_object({"callback": section})).callback


def validate(shards: Path, output: Path, task: Any, callback: Callback, devices: int = 1) -> dict[str, float]:
    """Validate, and return what was logged."""
    trainer = Trainer(
        default_root_dir=output, logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[callback], accelerator="cpu", use_distributed_sampler=False, devices=devices,
        strategy="ddp" if devices > 1 else "auto",
    )  # fmt: skip
    data = image_shards(shards, stage=None, image_size=16, batch_size=4)
    trainer.validate(task, datamodule=data, verbose=False)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def validate_both(folder: Path, devices: int) -> None:
    """Measure reconstructions and samples, and write what was logged."""
    output = folder / str(devices)
    logged = validate(folder / "shards", output, Darker(), from_config("ImageMetrics"), devices)
    arguments = {"reference": str(folder / "real.npz"), "num_classes": 3, "samples": 9, "batch_size": 2}
    logged |= validate(folder / "shards", output, Painter(), from_config("SampleMetrics", **arguments), devices)
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        (output / "logged.json").write_text(json.dumps(logged))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write eleven images and reference images of one colour, and measure on one and on two processes."""
    folder = tmp_path_factory.mktemp("extension")
    write_bright_shards(folder / "shards", [5, 6])
    np.savez(folder / "real.npz", arr_0=np.full((10, 8, 8, 3), 100, dtype=np.uint8))
    for processes in (1, 2):
        run_group(processes, validate_both, folder, processes)
    return folder


def test_one_config_line_measures_logs_and_writes(folder: Path) -> None:
    logged = json.loads((folder / "1" / "logged.json").read_text())
    reconstructions, samples = json.loads((folder / "1" / "metrics.json").read_text())
    assert reconstructions["metrics"]["brightness_gap"] == pytest.approx(-LEVELS, abs=1e-9)
    indices = torch.arange(9)
    levels = (127.5 * Painter().sample(indices % 3, indices).clamp(-1, 1) + 127.5).round()
    assert samples["metrics"]["brightness_gap"] == pytest.approx(levels.double().mean().item() - 100, abs=1e-9)
    assert logged["validation/brightness_gap"] == pytest.approx(samples["metrics"]["brightness_gap"])
    assert logged["validation/reconstruction_fd"] == pytest.approx(0.12, rel=1e-5)  # the protocol's are measured too


def test_two_processes_measure_what_one_does(folder: Path) -> None:
    one, two = (json.loads((folder / processes / "metrics.json").read_text()) for processes in "12")
    assert len(one) == len(two) == 2
    for found, expected in zip(two, one, strict=True):
        assert found["metrics"]["brightness_gap"] == expected["metrics"]["brightness_gap"]
        assert (found["hash"], found["samples"]) == (expected["hash"], expected["samples"])


def test_the_command_and_a_protocol_take_a_class_path(tmp_path: Path) -> None:
    images = pictures(6, size=16)
    for name, side in (("real", images), ("samples", images // 2)):
        np.savez(tmp_path / f"{name}.npz", arr_0=side.permute(0, 2, 3, 1).numpy())
    arguments = [f"--samples={tmp_path / 'samples.npz'}", f"--reference={tmp_path / 'real.npz'}", "--feature-size=32"]
    arguments += ["--device=cpu", "--protocol=rfid-val"]
    plain = measure_files(arguments)
    measured = measure_files([*arguments, "--metrics", "tests.extensions.metric.BrightnessGap"])
    expected = (images // 2).double().mean().item() - images.double().mean().item()
    assert measured.values["brightness_gap"] == pytest.approx(expected, rel=1e-12)
    assert measured.values == {**plain.values, "brightness_gap": measured.values["brightness_gap"]}
    assert measured.hash == plain.hash  # the numbers of the protocol still compare
    with pytest.raises(ValueError, match=r"no metric 'tests\.extensions\.metric\.Nothing': give the class path"):
        measure_files([*arguments, "--metrics", "tests.extensions.metric.Nothing"])
    with pytest.raises(ValueError, match=r"Batch is not a Metric: derive it from maetok\.metrics\.Metric"):
        measure_files([*arguments, "--metrics", "maetok.metrics.Batch"])
    own = EvaluationProtocol(
        "own", ("tests.extensions.metric.BrightnessGap",), 6, 6, False, "images", "validation", crop="none"
    )
    evaluator = ImageEvaluator(own, MeanColours())
    evaluator.update(images // 2, torch.arange(6))
    evaluator.update(images, torch.arange(6), is_reference=True)
    assert evaluator.compute(6, 6).values == pytest.approx({"brightness_gap": expected})


class LargestError(MeanOverPairs):
    """Needs pairs, and brings a network of its own."""

    name = "largest_error"
    digest = "f" * 64

    def values(self, samples: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
        return (samples.float() - references.float()).abs().flatten(1).max(1).values


def test_needs_decide_what_a_metric_receives() -> None:
    images, indices = pictures(3, size=16), torch.arange(3)
    paired = ImageEvaluator(RFID_VAL, MeanColours(), metrics=[LargestError()])
    paired.update_pairs(images // 2, images, indices)
    measured = paired.compute(3, 3)
    assert measured.values["largest_error"] == (images - images // 2).flatten(1).amax(1).double().mean().item()
    assert measured.digests["largest_error"] == "f" * 64
    apart = ImageEvaluator(RFID_VAL, MeanColours(), metrics=[LargestError(), BrightnessGap()])
    apart.update(images // 2, indices)
    apart.update(images, indices, is_reference=True)
    measured = apart.compute(3, 3)
    assert "no pairs of images" in measured.unavailable["largest_error"]
    assert "brightness_gap" in measured.values


def test_a_metric_starts_anew_in_each_evaluator_and_names_differ() -> None:
    metric = BrightnessGap()
    for offset in (10, 30):
        evaluator = ImageEvaluator(RFID_VAL, MeanColours(), metrics=[metric])
        images = torch.full((2, 3, 16, 16), 100, dtype=torch.uint8)
        evaluator.update_pairs(images + offset, images, torch.arange(2))
        assert evaluator.compute(2, 2).values["brightness_gap"] == offset
    with pytest.raises(ValueError, match="two metrics have one name"):
        ImageEvaluator(RFID_VAL, MeanColours(), metrics=[metric, BrightnessGap()])
