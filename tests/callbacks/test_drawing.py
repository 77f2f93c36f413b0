"""Pictures arrive in every logger and in the run directory, pixel by pixel."""

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks.pictures.drawing import picture_grid, show_picture
from tests.support.helpers import TINY, run

PICTURE = torch.tensor([[[0.0, 1.0]], [[0.5, 1.0]], [[1.0, 0.0]]])
PIXELS = [[[0, 128, 255], [255, 255, 0]]]
NAME, STEP = "samples: without | with guidance", 7


def test_picture_grid_has_a_row_per_image_and_a_column_per_view() -> None:
    views = {"white": torch.ones(2, 3, 4, 4), "black": -torch.ones(2, 3, 8, 8), "bright": torch.full((2, 3, 4, 4), 7.0)}
    grid = picture_grid(views, side=6, gap=1)
    assert grid.shape == (3, 2 * 8, 3 * 8)
    assert grid[:, 1:7, 9:15].max() == 0  # the black cell of the first row
    assert grid[:, :, :8].min() == 1
    assert grid.max() == 1


def shown(folder: Path, *loggers: Logger) -> None:
    trainer: Any = SimpleNamespace(loggers=list(loggers), default_root_dir=folder / "run")
    show_picture(trainer, NAME, PICTURE, STEP, "samples_")


def pixels(path: Any) -> list[list[list[int]]]:
    return np.array(Image.open(path)).tolist()


def test_tensorboard_and_the_run_directory_get_the_picture(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="")
    shown(tmp_path, CSVLogger(tmp_path / "csv"), logger)
    logger.finalize("success")
    assert pixels(tmp_path / "run" / "pictures" / "samples_step=000000007.png") == PIXELS
    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Tags()["images"] == [NAME]
    (image,) = events.Images(NAME)
    assert image.step == STEP
    assert pixels(io.BytesIO(image.encoded_image_string)) == PIXELS


@pytest.fixture
def wandb_logger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WandbLogger:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    return WandbLogger(save_dir=tmp_path, project="test", offline=True)


@pytest.fixture
def mlflow_logger(tmp_path: Path) -> MLFlowLogger:
    return MLFlowLogger(
        "test", tracking_uri=f"sqlite:///{tmp_path}/mlflow.db", artifact_location=str(tmp_path / "mlflow")
    )


@pytest.mark.loggers
def test_weights_and_biases_gets_the_picture(tmp_path: Path, wandb_logger: WandbLogger) -> None:
    shown(tmp_path, wandb_logger)
    summary = dict(wandb_logger.experiment.summary)
    (path,) = Path(wandb_logger.experiment.dir).rglob("*.png")
    assert pixels(path) == PIXELS
    assert summary["trainer/global_step"] == STEP
    assert NAME in summary
    wandb_logger.experiment.finish()


@pytest.mark.loggers
def test_mlflow_gets_the_picture(tmp_path: Path, mlflow_logger: MLFlowLogger) -> None:
    shown(tmp_path, mlflow_logger)
    found = [path for path in (tmp_path / "mlflow").rglob("*.png") if "compressed" not in path.name]
    assert [pixels(path) for path in found] == [PIXELS]
    assert found[0].name.startswith(f"samples - without - with guidance+step+{STEP}+")


def sizes(folder: Path) -> set[tuple[int, int]]:
    """Return the sizes of all pictures in a folder, without the thumbnails that MLflow adds."""
    return {Image.open(path).size for path in folder.rglob("*.png") if "compressed" not in path.name}


@pytest.mark.loggers
def test_a_run_logs_its_pictures_and_scalars_to_both(
    tmp_path: Path, digits_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All callbacks of a shipped experiment run under these loggers, and a continued run too."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    loggers = tmp_path / "loggers.yaml"
    loggers.write_text(
        f"""
trainer:
  logger:
    - class_path: lightning.pytorch.loggers.WandbLogger
      init_args: {{save_dir: {tmp_path}, offline: true}}
    - class_path: lightning.pytorch.loggers.MLFlowLogger
      init_args: {{tracking_uri: "sqlite:///{tmp_path}/mlflow.db", artifact_location: {tmp_path}/mlflow}}
"""
    )
    configs = [f"--config={TINY.with_name('analysis.yaml')}", f"--config={loggers}"]
    for flags in ((), ("--ckpt_path=last", "--trainer.max_steps=4")):
        cli = run("fit", "digits_tokenizer", tmp_path / "run", digits_root, *configs, *flags)
        wandb_logger, mlflow_logger = cli.trainer.loggers
        drawn = sizes(tmp_path / "run" / "pictures")
        assert len(drawn) > 1
        assert sizes(Path(wandb_logger.experiment.dir)) >= drawn
        assert sizes(tmp_path / "mlflow") >= drawn
        stored = mlflow_logger.experiment.get_run(mlflow_logger.run_id).data.metrics
        logged = float(cli.trainer.callback_metrics["validation/psnr"])
        assert stored["validation/psnr"] == pytest.approx(logged)
        assert wandb_logger.experiment.summary["validation/psnr"] == pytest.approx(logged)
        wandb_logger.experiment.finish()
