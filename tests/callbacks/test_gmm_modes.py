"""Modes of the latent space have known values, come when they are due, and go to logs and files."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks import GMMModes
from maetok.analysis.modes import read_json
from tests.support.fakes import Task, validating
from tests.support.helpers import ROOT, run, run_subprocess
from tests.support.latents import MeanColours
from tests.support.shards import image_shards, write_shards


class Validated(MeanColours):
    """The encoder of small caches, with a validation step."""

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        """Callbacks do the work."""


def validate(shards: Path, folder: Path, **trainer: object) -> None:
    """Analyse the latents of a folder of shards, on one or more processes."""
    data = image_shards(shards, stage=None, evaluation_batch_size=6, num_classes=4)
    callback = GMMModes([2, 3], dimensions=4, per_class=8, max_samples=48, restarts=2)
    defaults = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "use_distributed_sampler": False}
    Trainer(**(defaults | trainer), default_root_dir=folder, callbacks=[callback]).validate(
        Validated(), data, verbose=False
    )


PROGRAM = """
import sys
from pathlib import Path
from tests.callbacks.test_gmm_modes import validate
validate(Path(sys.argv[1]), Path(sys.argv[2]) / "run", devices=2, strategy="ddp")
"""


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    write_shards(tmp_path / "shards", [31, 33, 29], classes=4)
    write_shards(tmp_path / "shards", [41], split="validation", classes=4)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    validate(tmp_path / "shards", tmp_path / "one" / "run")
    run_subprocess(PROGRAM, tmp_path, str(tmp_path / "shards"), str(tmp_path / "two"))
    (one,), (two,) = (
        read_json(tmp_path / name / "run" / "analysis" / "gmm_modes_step=000000000.json") for name in ("one", "two")
    )
    assert one == two  # bit for bit: an encoding does not depend on the batch
    assert one.samples == one.held_out_samples == 4 * 8  # as many of each class, out of 47 and 41 that were encoded
    assert sorted(path.name for path in (tmp_path / "two" / "run").iterdir()) == ["analysis", "pictures"]


def clusters(counts: dict[float, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images that differ in one latent value, and the cluster of each."""
    values = torch.cat([torch.full((count,), value) for value, count in counts.items()])
    images = torch.zeros(len(values), 3, 4, 4)
    images[:, 0, 0, 0] = values
    return images, values.unique(return_inverse=True)[1]


def test_three_points_are_three_modes_of_known_likelihood(tmp_path: Path) -> None:
    """Training latents lie at -8, 0 and 8, and 25 of each are taken; held-out latents lie at 0."""
    splits = {"train": clusters({-8.0: 50, 0.0: 25, 8.0: 31}), "validation": clusters({0.0: 40})}

    def loader(split: str, max_samples: int) -> list[dict[str, torch.Tensor]]:
        images, labels = splits[split]
        indices = torch.arange(len(images))
        return [{"images": images, "labels": labels, "valid": indices >= 0, "indices": indices}]

    data = SimpleNamespace(evaluation_dataloader=loader)
    task, trainer = Task(), validating(*splits["train"], tmp_path / "mine", datamodule=data)
    callback = GMMModes([1, 3], dimensions=1, per_class=25, covariance_type="diag", regularization=0.01)
    callback.on_test_epoch_end(trainer, task)
    one, three = 74 / 75 + 0.01, 0.01  # variances of the components, of standardised latents
    nll = {
        1: (0.5 * (np.log(2 * np.pi * one) + 74 / 75 / one), 0.5 * np.log(2 * np.pi * one)),
        3: (np.log(3) + 0.5 * np.log(2 * np.pi * three),) * 2,
    }
    far = 8 / (2 * 64 / 3 * 75 / 74) ** 0.5
    expected = {"validation/gmm_modes_nll": 3, "validation/gmm_modes_bic": 3}
    for count, norm, weight, parameters in ((1, 0, 1, 2), (3, far, 1 / 3, 8)):
        fit, held_out = nll[count]
        expected |= {
            f"gmm_nll/{count}": fit,
            f"gmm_nll_held_out/{count}": held_out,
            f"gmm_bic/{count}": 2 * 75 * fit + parameters * np.log(75),
            f"gmm_largest_mean_norm/{count}": norm,
            f"gmm_smallest_weight/{count}": weight,
            f"gmm_converged/{count}": 1,
        }
    assert task.logged == pytest.approx(expected, rel=1e-9, abs=1e-12)
    name = "gmm_modes_step=000000000"
    (analysis,) = read_json(tmp_path / "mine" / "analysis" / f"{name}.json")
    assert (analysis.name, analysis.samples, analysis.held_out_samples) == ("mine", 75, 25)
    with (tmp_path / "mine" / "analysis" / f"{name}.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["components"], float(row["nll_held_out"])) for row in rows] == [
        (str(count), pytest.approx(nll[count][1], rel=1e-9)) for count in (1, 3)
    ]
    picture = np.asarray(Image.open(tmp_path / "mine" / "pictures" / f"{name}.png"))
    assert picture.shape == (504, 768, 3)
    assert (picture == [31, 119, 180]).all(-1).sum() > 500  # a curve in the first colour


def validations(callback: GMMModes, steps: int, position: int = 0) -> list[int]:
    """Return the steps after which the callback runs; a step has 30 samples, every second one validates, 20 is last."""
    due = []
    for step in range(2, steps + 1, 2):
        data = SimpleNamespace(position=position + step * 30, epoch_samples=100, batch_size=30)
        trainer = SimpleNamespace(
            state=SimpleNamespace(fn="fit"), global_step=step, max_steps=20, val_check_batch=2, datamodule=data,
            lightning_module=None,
        )  # fmt: skip
        if callback.measures(trainer):
            due.append(step)
    return due


def test_it_runs_after_so_many_epochs_or_steps_and_at_the_end() -> None:
    assert validations(GMMModes(), 20) == [20]
    assert validations(GMMModes(every_n_steps=6), 20) == [6, 12, 18, 20]
    assert validations(GMMModes(every_n_steps=5), 20) == [6, 10, 16, 20]  # also where 5 and 2 do not meet
    assert validations(GMMModes(every_n_steps=1), 8) == [2, 4, 6, 8]
    assert validations(GMMModes(every_n_epochs=1), 20) == [4, 8, 10, 14, 18, 20]  # 120, 240, 300, 420, 540 samples
    assert validations(GMMModes(every_n_epochs=2), 20) == [8, 14, 20]  # 240, 420, 600
    assert validations(GMMModes(every_n_epochs=2, every_n_steps=10), 20) == [8, 10, 14, 20]


class Trained(Validated):
    """Trains a weight that does nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch: dict, batch_idx: int) -> torch.Tensor:
        return self.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_fit_measures_after_every_epoch_and_at_the_end(tmp_path: Path) -> None:
    """An epoch has three steps: twelve images in batches of four."""
    write_shards(tmp_path / "shards", [12], classes=2)
    write_shards(tmp_path / "shards", [8], split="validation", classes=2)
    data = image_shards(tmp_path / "shards", stage=None, batch_size=4, num_classes=2)
    Trainer(
        max_steps=7, val_check_interval=1, check_val_every_n_epoch=None, accelerator="cpu", logger=False,
        enable_progress_bar=False, enable_checkpointing=False, use_distributed_sampler=False,
        default_root_dir=tmp_path / "run", callbacks=[GMMModes([2], dimensions=2, restarts=1, every_n_epochs=1)],
    ).fit(Trained(), data)  # fmt: skip
    steps = [path.stem.rpartition("=")[2] for path in sorted((tmp_path / "run" / "analysis").glob("*.csv"))]
    assert [int(step) for step in steps] == [3, 6, 7]


def test_what_an_earlier_validation_found_is_forgotten(tmp_path: Path) -> None:
    old = {"validation/gmm_modes_nll": 3, "validation/gmm_modes_bic": 3, "gmm_nll/5": 1.0, "validation/psnr": 20.0}
    options = {"state": SimpleNamespace(fn="fit"), "global_step": 5, "callback_metrics": old}
    trainer, task = validating(torch.zeros(9, 3, 4, 4), torch.zeros(9).long(), tmp_path, **options), Task()
    GMMModes().on_validation_epoch_end(trainer, task)
    assert not task.logged
    assert list(old) == ["validation/psnr"]


def test_too_few_latents_for_the_components_are_an_error_on_every_process(tmp_path: Path) -> None:
    images, labels = torch.randn(9, 3, 4, 4), torch.zeros(9).long()
    trainer = validating(images, labels, tmp_path, is_global_zero=False)
    with pytest.raises(ValueError, match="12 components cannot be fitted to 9 samples"):
        GMMModes([2, 12]).on_validation_epoch_end(trainer, Task())


def test_a_run_has_scalars_picture_and_files(tmp_path: Path, digits_root: Path) -> None:
    overlay = tmp_path / "overlay.yaml"
    arguments = {"component_counts": [2, 3], "dimensions": 2, "per_class": 60, "max_samples": 64, "restarts": 1}
    attached = [{"class_path": "callbacks.GMMModes", "init_args": arguments}]
    callbacks = {"trainer": {"callbacks+": attached}}
    overlay.write_text(yaml.safe_dump(callbacks))
    run("fit", "imagenet256_maetok_b128", tmp_path / "run", digits_root, f"--config={overlay}")
    (analysis,) = read_json(tmp_path / "run" / "analysis" / "gmm_modes_step=000000002.json")
    assert (analysis.name, analysis.samples, [fit.components for fit in analysis.fits]) == ("run", 64, [2, 3])
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    for fit in analysis.fits:
        (event,) = events.Scalars(f"gmm_nll_held_out/{fit.components}")
        assert (event.step, event.value) == (2, pytest.approx(fit.nll_held_out, rel=1e-6))
    assert "GMM modes" in events.Tags()["images"]
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert record["validation/gmm_modes_nll"] == analysis.modes_by_held_out_nll


def test_the_overlay_attaches_it() -> None:
    overlay = yaml.safe_load((ROOT / "configs" / "overlay" / "analysis.yaml").read_text())
    callbacks = (one for one in overlay["trainer"]["callbacks+"] if isinstance(one, dict))
    (attached,) = (one for one in callbacks if one["class_path"] == "callbacks.GMMModes")
    callback = GMMModes(**attached["init_args"])
    assert max(callback.component_counts) < callback.per_class  # enough latents even of one class
