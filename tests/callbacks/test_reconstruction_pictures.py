"""Reconstructions are drawn pixel by pixel: the first images, a row each, and the task's views as columns."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from callbacks import ReconstructionPictures
from tests.support.fakes import Task, validating


class TwoViews(Task):
    """The second view has half the contrast."""

    checkpoint_step = 70

    def views(self, images: Tensor) -> dict[str, Tensor]:
        return {"input": images, "reconstruction": self.reconstruct(images)}


def grey(levels: list[float]) -> Tensor:
    return torch.tensor(levels)[:, None, None, None].expand(-1, 3, 2, 2).contiguous()


def draw(folder: Path, batch_index: int = 0, **options: Any) -> None:
    images = grey([-1.0, 0.0, 1.0])
    trainer = validating(images, torch.zeros(3), folder, **options)
    ReconstructionPictures(images=2, side=4).on_validation_batch_end(
        trainer, TwoViews(), None, {"images": images}, batch_index
    )


def test_a_row_for_each_of_the_first_images_and_a_column_for_each_view(tmp_path: Path) -> None:
    draw(tmp_path)
    picture = np.array(Image.open(tmp_path / "pictures" / "step=000000070.png"))
    assert picture.shape == (2 * 8, 2 * 8, 3)  # cells of four pixels, with gaps of two around each
    centres = picture[4::8, 4::8]
    assert centres[..., 0].tolist() == [[0, 64], [128, 128]]
    assert (centres == centres[..., :1]).all()


def test_only_the_first_process_draws_and_only_the_first_batch(tmp_path: Path) -> None:
    for options in ({"batch_index": 1}, {"is_global_zero": False}, {"sanity_checking": True}):
        draw(tmp_path, **options)
    assert not list(tmp_path.iterdir())
