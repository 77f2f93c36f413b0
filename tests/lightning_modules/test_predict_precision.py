"""Predicting in bf16-mixed: weights are held in bfloat16, and what comes out is what autocast gives."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from lightning_modules import LatentEncoding
from lightning_modules.base import Task
from tests.strategies.runs import build, tokenizer

ROWS = [
    {"images": torch.rand(3, 16, 16) * 2 - 1, "labels": torch.tensor(row), "indices": torch.tensor(row), "valid": True}
    for row in range(6)
]


def diffusion() -> Task:
    task: Any = build(3)
    with torch.no_grad():
        for parameter in task.averaged_denoiser.parameters():
            parameter.normal_(std=0.2)
    task.statistics_from = "nowhere"  # it has weights to sample from
    task.denoiser.published_config = {"name": "any"}
    return task


def predictions(task: Task, folder: Path) -> torch.Tensor:
    trainer = Trainer(
        accelerator="cpu", precision="bf16-mixed", logger=False, enable_progress_bar=False, default_root_dir=folder
    )
    return torch.cat(trainer.predict(task, DataLoader(ROWS, 3)))


@pytest.mark.parametrize("name", ["sampling", "encoding"])
def test_outputs_are_those_of_float32_weights_under_autocast(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def task() -> Task:
        torch.manual_seed(0)
        return diffusion() if name == "sampling" else LatentEncoding(tokenizer())

    lowered, reference = task(), task()
    found = predictions(lowered, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("lightning_modules.base.keep_bfloat16_weights", lambda _: None)
        expected = predictions(reference, tmp_path)
    assert torch.equal(found, expected)
    network = lowered.averaged_denoiser if name == "sampling" else lowered.tokenizer
    held = {parameter.dtype for name, parameter in network.named_parameters() if name.endswith("mlp.fc1.weight")}
    assert held == {torch.bfloat16}
    if name == "sampling":
        weight = lowered.tokenizer.network.decoder.blocks[0].mlp.fc1.weight
        assert weight.dtype == torch.bfloat16
