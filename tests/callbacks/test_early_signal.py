"""The early signal has known values, is the same on two processes, and leaves training as it is."""

import json
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from torch import Tensor

from callbacks import EarlySignal, Interpolations, LinearProbe
from callbacks.schedule import is_due
from maetok.flow import index_noise
from main import main
from tests.support.fakes import Task, validating
from tests.support.helpers import ROOT, run, run_subprocess
from tests.support.latents import MeanColours
from tests.support.shards import image_shards, write_shards

SMALL = {"components": (1, 2), "dimensions": 3, "diffusion_steps": 3, "iterations": 20}


def samples() -> tuple[Tensor, Tensor]:
    images = torch.randn(60, 3, 4, 4)
    return images, (images[:, 0, 0, 0] > 0).long()


def test_latents_of_known_answers() -> None:
    """One value of 12 varies: -5, -3, 3 or 5 where mixtures are fitted, -4 or 4 where they are measured."""
    values = {
        "train": torch.tensor([-5.0, -3.0, 3.0, 5.0]).repeat(15),
        "validation": torch.tensor([-4.0, 4.0]).repeat(30),
    }
    labels = {split: (points > 0).long() for split, points in values.items()}
    labels["validation"][:6] = 1 - labels["validation"][:6]  # a classifier must get these wrong

    def loader(split: str, max_samples: int) -> list[dict[str, Tensor]]:
        images, indices = torch.zeros(60, 3, 4, 4), torch.arange(60)
        images[:, 0, 0, 0] = values[split]
        return [{"images": images, "labels": labels[split], "valid": indices >= 0, "indices": indices}]

    task, trainer = Task(), validating(*samples(), datamodule=SimpleNamespace(evaluation_dataloader=loader))
    arguments = {"components": (1, 2), "dimensions": 1, "diffusion_steps": 1, "iterations": 100}
    EarlySignal(0, **arguments).on_validation_epoch_end(trainer, task)
    loss = task.logged.pop("early/diffusion_loss")
    share = 59 / 60  # standardising divides by n - 1, a mixture by n

    def nll(fitted: float, measured: float) -> float:
        """Return the NLL of a normal distribution fitted to one variance, on samples of another."""
        return 0.5 * (np.log(2 * np.pi * (fitted + 1e-6)) + measured / (fitted + 1e-6))

    assert task.logged == pytest.approx(
        {
            "early/linear_probe": 54 / 60,
            "early/nll/1": nll(share, share * 16 / 17),
            "early/nll/2": np.log(2) + nll(share / 17, 0),  # two halves around -4 and 4, each of variance 1
        },
        rel=1e-6,
    )
    # After one step the network still predicts almost nothing: the loss is the mean square of noise - latents.
    normalized = torch.zeros(60, 3, 4)
    normalized[:, 0, 0] = values["validation"] / (17 / 3) ** 0.5  # the channel is 0 in two of three tokens
    noise = index_noise(0, torch.arange(60), shape=(3, 4))
    assert loss == pytest.approx((noise - normalized).square().mean().item(), rel=0.05)


@pytest.mark.parametrize(("step", "every", "expected"), [(5, 0, False), (4, 2, True), (5, 2, False), (10, 3, True)])
def test_it_is_measured_at_multiples_and_in_the_end(step: int, every: int, expected: bool) -> None:
    task, trainer = Task(), validating(*samples(), state=SimpleNamespace(fn="fit"), global_step=step)
    trainer.callback_metrics = {"early/linear_probe": 0.5, "validation/psnr": 20.0}
    EarlySignal(every, **SMALL).on_validation_epoch_end(trainer, task)
    assert bool(task.logged) == expected
    assert ("early/linear_probe" in trainer.callback_metrics) == expected  # else the earlier value is gone


def test_generators_gradients_and_modes_stay_as_they_are() -> None:
    images, labels = samples()
    before = torch.get_rng_state(), np.random.get_state()[1], random.getstate()
    trainer = validating(images, labels)
    batches = trainer.datamodule.evaluation_dataloader

    def drawing(split: str, max_samples: int) -> list[dict[str, Tensor]]:
        torch.rand(1)  # as loaders do
        return batches(split, max_samples)

    trainer.datamodule.evaluation_dataloader = drawing
    with torch.no_grad():
        EarlySignal(0, **SMALL).on_validation_epoch_end(trainer, Task())
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert random.getstate() == before[2]


def test_validations_that_never_hit_a_multiple_measure_after_it() -> None:
    """Validations come every 5,000 steps of two micro-batches; measurements every 350 or 12,000 steps."""
    due: dict[int, list[int]] = {350: [], 12_000: []}
    for step in range(5000, 30_000, 5000):
        trainer = validating(
            *samples(), state=SimpleNamespace(fn="fit"), global_step=step, max_steps=500_000, val_check_batch=10_000,
            lightning_module=SimpleNamespace(accumulate_grad_batches=2),
        )  # fmt: skip
        for every in due:
            due[every] += [step] * is_due(trainer, every)
    assert due == {350: [5000, 10_000, 15_000, 20_000, 25_000], 12_000: [15_000, 25_000]}


def test_each_multiple_counts_once_where_validations_fall_within_a_step() -> None:
    """Validations come every 6 micro-batches; a step has 4."""
    due = []
    for batches in range(6, 66, 6):
        task = SimpleNamespace(accumulate_grad_batches=4, micro_step=batches % 4)
        trainer = validating(
            *samples(), state=SimpleNamespace(fn="fit"), global_step=batches // 4, max_steps=500_000,
            val_check_batch=6, lightning_module=task,
        )  # fmt: skip
        due += [batches // 4] * is_due(trainer, 3)
    assert due == [3, 6, 9, 12, 15]


@pytest.mark.parametrize("experiment", ["digits_tokenizer", "imagenet256_maetok_b128"])
def test_the_overlay_attaches_it(experiment: str, capsys: pytest.CaptureFixture[str]) -> None:
    overlays = [f"--config={ROOT}/configs/overlay/{name}.yaml" for name in ("early_signal", "analysis")]
    with pytest.raises(SystemExit):
        main(["fit", f"--config={ROOT}/configs/experiment/{experiment}.yaml", *overlays, "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)["trainer"]["callbacks"]
    assert [one["class_path"] for one in printed[-4:]] == [
        f"callbacks.{name}" for name in ("EarlySignal", "GMMModes", "LatentPictures", "Interpolations")
    ]
    callback = EarlySignal(**printed[-4]["init_args"])
    assert 0 < callback.every_n_steps <= 350  # the first validation of the digits


def test_more_components_than_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="50 components cannot be fitted to 40 samples"):
        EarlySignal(0, max_samples=40, components=(5, 50))


OVERLAY = """
trainer:
  max_steps: 3
  val_check_interval: 1
  callbacks+:
    - class_path: callbacks.EarlySignal
      init_args: {every_n_steps: 1, max_samples: 64, components: [2], dimensions: 4, diffusion_steps: 2}
"""


def test_training_is_bit_identical_with_and_without(tmp_path: Path, digits_root: Path) -> None:
    states = []
    for name, text in (("with", OVERLAY), ("without", OVERLAY.partition("  callbacks+")[0])):
        (tmp_path / f"{name}.yaml").write_text(text)
        after = f"--config={tmp_path / name}.yaml"
        cli = run("fit", "digits_tokenizer", tmp_path / name, digits_root, after)
        states.append(torch.load(tmp_path / name / "checkpoints" / "step=000000003.ckpt", weights_only=True))
        assert ("early/diffusion_loss" in cli.trainer.callback_metrics) == (name == "with")
        report = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in report if "early/diffusion_loss" in line] == [1, 2, 3] * (name == "with")
    tensors = [
        state["state_dict"] | {f"{place}": moments["exp_avg"] for place, moments in optimizer["state"].items()}
        for state in states
        for optimizer in state["optimizer_states"]
    ]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
    assert any(value.any() for name, value in tensors[0].items() if name.isdigit())  # it has trained


class Invertible(MeanColours):
    """Decodes mean colours into an image."""

    def decode(self, latents: Tensor) -> Tensor:
        return latents.transpose(1, 2).unflatten(2, (2, 2)).repeat_interleave(4, 2).repeat_interleave(4, 3)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        pass


def measure(folder: Path, devices: int) -> None:
    """Validate with three callbacks, and write the numbers that this process knows."""
    trainer = Trainer(
        accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", logger=False,
        use_distributed_sampler=False, enable_progress_bar=False, default_root_dir=folder,
        callbacks=[EarlySignal(0, **SMALL), Interpolations(pairs=3, steps=1), LinearProbe()],
    )  # fmt: skip
    trainer.validate(Invertible(), image_shards(folder / "shards", stage=None), verbose=False)
    numbers = {name: float(value) for name, value in trainer.callback_metrics.items()}
    (folder / f"{devices}_{trainer.global_rank}.json").write_text(json.dumps(numbers))


PROGRAM = """
import sys
from pathlib import Path
from tests.callbacks.test_early_signal import measure
measure(Path(sys.argv[1]), 2)
"""


def test_both_of_two_processes_get_the_numbers_of_one(tmp_path: Path) -> None:
    write_shards(tmp_path / "shards", [9, 14])
    write_shards(tmp_path / "shards", [13], split="validation")
    measure(tmp_path, 1)
    run_subprocess(PROGRAM, tmp_path, str(tmp_path))
    one, first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1_0", "2_0", "2_1"))
    assert first == second
    assert first.keys() == one.keys()
    assert len(one) == 4 + 3 + 5
    assert first == pytest.approx(one, rel=1e-6)
    assert one["validation/interpolation_cycle_error"] == pytest.approx(0, abs=1e-6)  # mean colours are linear
