"""What is written of latents: picture, projector files and statistics, against the samples they should show."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from callbacks import LatentPictures
from maetok.analysis.latent_summary import LatentSummary
from maetok.analysis.plane import principal_components
from tests.support.fakes import Task, validating

STEP = 70


def samples() -> tuple[Tensor, Tensor]:
    """Images (40, 3, 8, 8), more of some of the five classes than of others, and labels."""
    labels = torch.tensor([0] * 4 + [1] * 10 + [2] * 6 + [3] * 12 + [4] * 8)
    noise = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return (noise * 0.2 + (labels[:, None, None, None] - 2) / 4).clamp(-1, 1), labels


def write(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Run the callback on 38 valid samples; latents and labels of those that are shown, in order."""
    images, labels = samples()
    task = Task()
    task.checkpoint_step = STEP
    trainer = validating(images, labels, folder, padding=2, loggers=[TensorBoardLogger(folder, name="", version="")])
    LatentPictures(classes=3, per_class=6, side=4).on_validation_epoch_end(trainer, task)
    trainer.loggers[0].finalize("success")
    latents = task.encode(images)[:38].numpy()
    statistics = json.loads((folder / "analysis" / "latent_statistics.json").read_text())
    assert statistics.pop("step") == STEP
    assert LatentSummary(**statistics) == LatentSummary.of(latents)
    return latents, labels[:38].numpy()


def test_projector_shows_the_same_number_of_each_class_with_label_and_image(tmp_path: Path) -> None:
    latents, labels = write(tmp_path)
    folder = tmp_path / "00070" / "latents"
    shown = [int(line) for line in (folder / "metadata.tsv").read_text().splitlines()]
    assert np.bincount(shown).tolist() == [4, 6, 6]  # all there are of class 0; none of the last classes
    sprite = np.array(Image.open(folder / "sprite.png"))
    assert sprite.shape == (16, 16, 3)  # four by four images of four by four pixels
    cells = sprite.reshape(4, 4, 4, 4, 3).swapaxes(1, 2).reshape(16, 1, 4, 4, 3)
    small = torch.nn.functional.avg_pool2d(samples()[0], 2).permute(0, 2, 3, 1).add(1).mul(127.5).numpy()
    differences = np.abs(small - cells).max((2, 3, 4))
    samples_shown = differences.argmin(1)
    assert differences.min(1).max() < 1.01  # it is rounded to uint8, and cut off by TensorBoard
    assert labels[samples_shown].tolist() == shown
    assert len(set(samples_shown)) == 16
    found = np.loadtxt(folder / "tensors.tsv")
    assert found.shape == (16, 12)
    np.testing.assert_allclose(found, principal_components(latents[samples_shown]), atol=1e-4)
    config = (tmp_path / "projector_config.pbtxt").read_text()
    assert config.count("embeddings {") == 1
    assert "00070/latents/sprite.png" in config


def test_picture_and_statistics_are_written_and_logged(tmp_path: Path) -> None:
    latents, _ = write(tmp_path)
    picture = np.array(Image.open(tmp_path / "pictures" / "latents_step=000000070.png"))
    assert picture.shape == (640, 1280, 3)
    assert all((picture == colour).all(-1).any() for colour in ([31, 119, 180], [255, 127, 14], [44, 160, 44]))
    events = EventAccumulator(str(tmp_path)).Reload()
    statistics = LatentSummary.of(latents)
    (rank,) = events.Scalars("latents/effective_rank")
    assert (rank.step, np.float32(rank.value)) == (STEP, np.float32(statistics.effective_rank))
    (histogram,) = events.Histograms("latents/excess_kurtosis")
    assert histogram.histogram_value.num == len(statistics.excess_kurtosis) == 4
    assert np.isclose(histogram.histogram_value.sum, sum(statistics.excess_kurtosis))
    assert events.Images("latents: principal components | t-SNE")[0].width == 1280


def test_only_the_last_validation_is_drawn_and_only_by_the_first_process(tmp_path: Path) -> None:
    images, labels = samples()
    for options in ({"state": SimpleNamespace(fn="fit"), "global_step": 5}, {"is_global_zero": False}):
        trainer = validating(images, labels, tmp_path, **options)
        LatentPictures(classes=3, per_class=6).on_validation_epoch_end(trainer, Task())
    assert not list(tmp_path.iterdir())
