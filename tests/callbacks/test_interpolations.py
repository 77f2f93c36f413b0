"""Rows between images A and B, and errors of the midpoints, with a tokenizer that is linear."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from callbacks import Interpolations
from tests.support.fakes import Task, validating


class Linear(Task):
    """Latents are the pixels, doubled."""

    def encode(self, images: Tensor) -> Tensor:
        return images.flatten(2) * 2

    def decode(self, latents: Tensor) -> Tensor:
        return (latents / 2).unflatten(2, (2, 2))


class Half(Linear):
    """Latents are the pixels, and images of latents are too dark by half."""

    def encode(self, images: Tensor) -> Tensor:
        return super().encode(images) / 2


def grey(levels: list[float]) -> Tensor:
    return torch.tensor(levels)[:, None, None, None].expand(-1, 3, 2, 2).contiguous()


def test_a_linear_tokenizer_cross_fades_without_error(tmp_path: Path) -> None:
    task, images = Linear(), grey([-1.0, 0.5, 1.0, -0.5])
    callback = Interpolations(pairs=2, rows=1, steps=3, side=4)
    callback.on_validation_epoch_end(validating(images, torch.zeros(4), tmp_path), task)
    assert task.logged == {
        "validation/interpolation_cycle_error": 0,
        "validation/interpolation_cycle_error_of_ends": 0,
        "validation/interpolation_pixel_change": 1,
    }
    picture = np.array(Image.open(tmp_path / "pictures" / "interpolations_step=000000000.png"))
    assert picture.shape == (4 + 4, 5 * 8, 3)  # one row; A, three between, B; gaps of two pixels around each
    assert picture[4, 4::8, 0].tolist() == [0, 64, 128, 191, 255]  # the first image and the third


def test_errors_are_of_all_pairs_and_of_valid_images_only(tmp_path: Path) -> None:
    """Latents are the grey levels: midpoints 0 and 0.5 come back as 0 and 0.25; halves of the ways are 1 and 0.

    The fifth image is padding.
    """
    task, images = Half(), grey([-1.0, 0.5, 1.0, 0.5, 9.0])
    trainer = validating(images, torch.zeros(5), tmp_path, padding=1)
    Interpolations(pairs=2).on_validation_epoch_end(trainer, task)
    assert task.logged["validation/interpolation_cycle_error"] == pytest.approx((0 + 0.25) / (1 + 0))
    ends = (0.5 + 0.25 + 0.5 + 0.25) / 2
    assert task.logged["validation/interpolation_cycle_error_of_ends"] == pytest.approx(ends / (1 + 0))


def test_only_the_last_validation_is_measured(tmp_path: Path) -> None:
    task, trainer = Linear(), validating(grey([0.0, 1.0]), torch.zeros(2), tmp_path)
    trainer.state = SimpleNamespace(fn="fit")
    for step in (5, 10):
        trainer.global_step = step
        Interpolations().on_validation_epoch_end(trainer, task)
        assert bool(task.logged) == (step == 10)
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["interpolations_step=000000010.png"]
