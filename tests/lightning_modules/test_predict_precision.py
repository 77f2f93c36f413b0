"""Networks are made ready before they predict: what comes out stays what it was, in either precision."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from lightning_modules import LatentEncoding
from lightning_modules.base import Task
from maetok.inference import PackedLinear
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


def predictions(task: Task, folder: Path, precision: Any) -> torch.Tensor:
    trainer = Trainer(
        accelerator="cpu", precision=precision, logger=False, enable_progress_bar=False, default_root_dir=folder
    )
    return torch.cat(trainer.predict(task, DataLoader(ROWS, 3))).float()


@pytest.mark.parametrize("name", ["sampling", "encoding"])
def test_outputs_are_those_of_unprepared_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def task() -> Task:
        torch.manual_seed(0)
        return diffusion() if name == "sampling" else LatentEncoding(tokenizer())

    bfloat16, float32 = task(), task()
    found = {"bf16-mixed": predictions(bfloat16, tmp_path, "bf16-mixed")}
    found["32-true"] = predictions(float32, tmp_path, "32-true")
    monkeypatch.setattr("lightning_modules.base.prepare_for_inference", lambda *_, **__: None)
    expected = {precision: predictions(task(), tmp_path, precision) for precision in found}
    assert (found["32-true"] - expected["32-true"]).abs().mean() < 1e-5 * expected["32-true"].std()
    error = (expected["bf16-mixed"] - expected["32-true"]).norm()
    assert 0 < (found["bf16-mixed"] - expected["32-true"]).norm() < 1.1 * error
    for prepared, dtype in ((bfloat16, torch.bfloat16), (float32, torch.float32)):
        network = prepared.averaged_denoiser if name == "sampling" else prepared.tokenizer
        packed = [module for module in network.modules() if isinstance(module, PackedLinear)]
        assert {layer.packed_weight.dtype for layer in packed} == {dtype}
        if name == "sampling":  # its decoder too
            assert isinstance(prepared.tokenizer.network.decoder.blocks[0].mlp.fc1, PackedLinear)
