"""Preparing networks for prediction changes no result, in either precision."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader

from lightning_modules import LatentDiffusion, LatentEncoding
from lightning_modules.base import Task
from maetok.networks.inference import PackedLinear, multiplied_by_onednn
from tests.support.strategies.runs import build, tokenizer

ROWS = [
    {"images": torch.rand(3, 16, 16) * 2 - 1, "labels": torch.tensor(row), "indices": torch.tensor(row), "valid": True}
    for row in range(6)
]


def diffusion() -> Task:
    task: Any = build(3)
    with torch.no_grad():
        for parameter in task.averaged_denoiser.parameters():
            parameter.normal_(std=0.2)
    task.statistics_from = "nowhere"  # pretend that the denoiser has trained weights
    task.denoiser.published_config = {"name": "any"}
    return task


class PackedDtypes(Callback):
    """Count the linear layers that are packed during prediction, in the predicting network and in the decoder."""

    def on_predict_batch_start(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        networks = [pl_module.tokenizer]
        if isinstance(pl_module, LatentDiffusion):
            networks = [pl_module.averaged_denoiser, pl_module.tokenizer.network.decoder]
        self.dtypes = [
            {module.packed_weight.dtype for module in network.modules() if isinstance(module, PackedLinear)}
            for network in networks
        ]


def predictions(task: Task, folder: Path, precision: Any) -> tuple[torch.Tensor, list[set[torch.dtype]]]:
    packed = PackedDtypes()
    trainer = Trainer(
        accelerator="cpu", precision=precision, logger=False, enable_progress_bar=False, default_root_dir=folder,
        callbacks=[packed],
    )  # fmt: skip
    return torch.cat(trainer.predict(task, DataLoader(ROWS, 3))).float(), packed.dtypes


@pytest.mark.parametrize("name", ["sampling", "encoding"])
def test_outputs_are_those_of_unprepared_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def task() -> Task:
        torch.manual_seed(0)
        return diffusion() if name == "sampling" else LatentEncoding(tokenizer())

    found, expected = {}, {}
    for precision, dtype in (("bf16-mixed", torch.bfloat16), ("32-true", torch.float32)):
        predicting = task()
        before = {key: value.clone() for key, value in predicting.state_dict().items()}
        found[precision], packed = predictions(predicting, tmp_path, precision)
        packs = multiplied_by_onednn(torch.zeros(1, dtype=dtype))  # float32 on CPUs without AMX, bfloat16 with AVX-512
        assert packed == [{dtype} if packs else set()] * len(packed)
        assert all(torch.equal(before[key], value) for key, value in predicting.state_dict().items())
        again, _ = predictions(predicting, tmp_path, precision)
        assert torch.equal(again, found[precision])
        with monkeypatch.context() as patch:
            patch.setattr("lightning_modules.base.prepare_for_inference", lambda *_: lambda: None)
            expected[precision], packed = predictions(task(), tmp_path, precision)
        assert packed == [set()] * len(packed)
    assert (found["32-true"] - expected["32-true"]).abs().mean() < 1e-5 * expected["32-true"].std()
    error = (expected["bf16-mixed"] - expected["32-true"]).norm()
    assert 0 < (found["bf16-mixed"] - expected["32-true"]).norm() < 1.1 * error
