"""Which checkpoints are kept, and the best of them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.utils.data import DataLoader

from callbacks import ResumableCheckpoint
from callbacks.resilience.checkpointing import resolve_checkpoint
from maetok.checkpoints.runs import complete_checkpoints, step_of

METRIC = {2: 5.0, 4: 1.0, 6: 4.0, 8: 2.0, 10: float("nan"), 12: 3.0}


class Measured(LightningModule):
    """A weight that counts steps, and a metric by step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return -self.weight

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("metric", METRIC[self.global_step])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def train(folder: Path, steps: int = 12, ckpt_path: str | None = None, **options: Any) -> None:
    trainer = Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, val_check_interval=2, check_val_every_n_epoch=None,
        num_sanity_val_steps=0, logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, callbacks=[ResumableCheckpoint(**options)],
    )  # fmt: skip
    data = DataLoader([0.0] * 50)
    trainer.fit(Measured(), data, DataLoader([0.0]), ckpt_path=ckpt_path)


def kept(folder: Path) -> list[int]:
    return [step_of(path) for path in complete_checkpoints(folder)]


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"keep_last": 2}, [9, 12]),
        ({"keep_last": -1}, [3, 6, 9, 12]),
        ({"keep_last": 1, "keep_every_n_steps": 6}, [6, 12]),
        ({"keep_last": 1, "keep_best": 2, "monitor": "metric"}, [4, 8, 12]),
        ({"keep_last": 1, "keep_best": 1, "monitor": "metric", "mode": "max", "keep_every_n_steps": 9}, [2, 9, 12]),
    ],
)
def test_rules_of_retention(tmp_path: Path, options: dict[str, Any], steps: list[int], asynchronous: bool) -> None:
    train(tmp_path, every_n_steps=3, asynchronous=asynchronous, **options)
    assert kept(tmp_path) == steps
    assert not list(tmp_path.glob("checkpoints/.*"))
    for path in complete_checkpoints(tmp_path):
        assert torch.load(path)["state_dict"]["weight"] == step_of(path)


def test_the_best_is_found_again_after_a_restart(tmp_path: Path) -> None:
    options = {"every_n_steps": 100, "keep_last": 1, "keep_best": 2, "monitor": "metric"}
    train(tmp_path, steps=6, **options)
    assert kept(tmp_path) == [4, 6]  # saved for their validation
    train(tmp_path, ckpt_path=resolve_checkpoint("last", tmp_path, "fit"), **options)
    assert kept(tmp_path) == [4, 8, 12]
    assert resolve_checkpoint("best", tmp_path, "test") == str(complete_checkpoints(tmp_path)[0])
    assert resolve_checkpoint("last", tmp_path, "test") == str(complete_checkpoints(tmp_path)[2])


def test_processes_agree_on_a_number_not_on_a_tensor_of_one_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = []
    monkeypatch.setattr(SingleDeviceStrategy, "broadcast", lambda self, value, src=0: sent.append(value) or value)
    train(tmp_path, steps=4, every_n_steps=2, keep_best=1, monitor="metric")
    assert [value for value in sent if isinstance(value, float)]
    assert not [value for value in sent if isinstance(value, torch.Tensor)]


def test_what_is_not_measured_has_no_best(tmp_path: Path) -> None:
    train(tmp_path, steps=2, every_n_steps=1)
    with pytest.raises(FileNotFoundError, match=r"--ckpt_path best: .* has no measured checkpoint; set keep_best"):
        resolve_checkpoint("best", tmp_path, "test")
    with pytest.raises(ValueError, match=r"monitor=loss is not logged in validation; the logged metrics are metric"):
        train(tmp_path / "other", keep_best=1, monitor="loss")


@pytest.mark.parametrize("options", [{"keep_best": 1}, {"monitor": "metric"}])
def test_settings_that_contradict_each_other(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"keep_best=\d and monitor=\w+ need each other"):
        ResumableCheckpoint(**options)
