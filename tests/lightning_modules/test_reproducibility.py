"""A run that is stopped and continued, or split over two processes, equals a run of one uninterrupted process."""

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest
import torch

from tests.support.helpers import EXPERIMENTS, ROOT, TINY, run, scalars, weights

# All parts that have state or noise: KL sampling, both optimizers, LeCAM, DiffAugment, accumulation, augmentation.
FULL = """
trainer:
  max_steps: 6
  val_check_interval: 6
  callbacks+:
    - tests.support.helpers.RecordScalars
data:
  init_args:
    loading:
      num_workers: {workers}
    random_crop_scale: [0.5, 1.0]
model:
  init_args:
    tokenizer:
      init_args:
        bottleneck:
          class_path: maetok.networks.{bottleneck}
    autoencoder_optimization: {optimization}
    discriminator_optimization: {optimization}
    accumulate_grad_batches: {accumulate}
"""
OPTIMIZATION = (
    "{{optimizer: {{class_path: torch.optim.{name}, init_args: {{lr: {rate}, weight_decay: 0.01{more}}}}},"
    " schedule: {{class_path: lightning_modules.CosineWithWarmup, init_args: {{warmup_steps: 2, final_ratio: 0.1}}}},"
    " gradient_clip: 1.0}}"
)


def overlay(folder: Path, bottleneck: str, optimizer: str, rate: float, accumulate: int, workers: int) -> str:
    more = {"AdamW": ", betas: [0.9, 0.95], fused: true", "SGD": ", momentum: 0.0, fused: false"}[optimizer]
    optimization = OPTIMIZATION.format(name=optimizer, rate=rate, more=more)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "overlay.yaml"
    path.write_text(
        FULL.format(bottleneck=bottleneck, optimization=optimization, accumulate=accumulate, workers=workers)
    )
    return f"--config={path}"


@pytest.mark.parametrize("stage", [1, 2])
def test_stopping_and_continuing_gives_the_same_losses_and_weights(
    tmp_path: Path, digits_root: Path, stage: int
) -> None:
    """Results are bit-equal in stage 1, and in stage 2 with noise on the latents (one loader process, CPU, float32)."""
    options = [overlay(tmp_path, "KLBottleneck", "AdamW", 1e-3, accumulate=2, workers=1)]
    experiment, tiny = "imagenet256_maetok_b128", TINY
    names = {"train/loss", "train/kl", "train/adversarial", "discriminator/lecam", "gradient_norm/discriminator"}
    if stage == 2:
        run("fit", experiment, tmp_path / "tokenizer", digits_root, *options, "--trainer.max_steps=2")
        init_from = f"--model.init_args.init_from.path={tmp_path / 'tokenizer'}"
        options += [init_from, "--model.init_args.latent_noise=0.1"]
        experiment, tiny = "imagenet256_decoder", TINY.with_name("tiny_decoder.yaml")
        names -= {"train/kl"}

    def fit(folder: str, *more: str) -> None:
        run("fit", experiment, tmp_path / folder, digits_root, *options, *more, overlay=f"--config={tiny}")

    fit("whole")
    fit("parts", "--trainer.callbacks+=tests.support.helpers.StopAt", "--trainer.callbacks.step=3")
    assert not (tmp_path / "parts" / "checkpoints" / "step=000000006.ckpt").exists()
    fit("parts", "--ckpt_path=last")
    whole, parts = scalars(tmp_path / "whole"), scalars(tmp_path / "parts")
    assert len(whole) == len(parts) == 12  # micro-batches
    assert names <= whole[-1].keys()
    for expected, found in zip(whole, parts, strict=True):
        common = expected.keys() & found.keys()  # some values are not logged again right after a restart
        assert {name: expected[name] for name in common} == {name: found[name] for name in common}
        assert "train/loss" in common
    first, second = weights(tmp_path / "whole", 6), weights(tmp_path / "parts", 6)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_two_processes_give_the_weights_of_one_with_the_whole_batch(tmp_path: Path, digits_root: Path) -> None:
    """DDP over gloo and one process with the same global batch reach the same weights in six visible steps of SGD.

    SGD, because AdamW turns rounding noise of 1e-8 in a gradient near zero into steps as large as its learning rate.
    Rounding may move one activation across the kink of a LeakyReLU, on some machines and not on others: 2e-5 in that
    layer of the discriminator, 2e-6 in a few tensors of the autoencoder. A reduction that is missing moves them all.
    """
    options = overlay(tmp_path, "PlainBottleneck", "SGD", 0.02, accumulate=2, workers=0)
    common = [
        f"--config={EXPERIMENTS / 'imagenet256_maetok_b128.yaml'}",
        f"--config={TINY}",
        options,
        f"--data.init_args.root={digits_root}",
    ]
    processes = {}
    for name, extra in (
        ("one", []),
        ("two", [f"--config={ROOT / 'configs' / 'overlay' / 'ddp.yaml'}", "--trainer.devices=2"]),
    ):
        command = [sys.executable, "main.py", "fit", *common, f"--trainer.default_root_dir={tmp_path / name}", *extra]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        output = (tmp_path / f"{name}.log").open("w+")
        processes[name] = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
    for name, process in processes.items():
        assert process.wait(timeout=300) == 0, (tmp_path / f"{name}.log").read_text()[-3000:]
    one, two = weights(tmp_path / "one", 6), weights(tmp_path / "two", 6)
    assert one.keys() == two.keys()
    assert any(name.startswith("discriminator.heads") for name in one)
    for part in ("model.", "discriminator."):
        differences = [(two[name] - one[name]).abs().max().item() for name in one if name.startswith(part)]
        assert median(differences) < 2e-7, part
        assert max(differences) < 5e-5, part
    early = weights(tmp_path / "one", 5)
    moved = max((one[name] - early[name]).abs().max().item() for name in one if name.startswith("model."))
    assert moved > 1e-4  # training has moved the weights, so equality proves something
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("one", "two")]
    measured = [json.loads(validations[-1]) for validations in lines]
    for name in ("psnr", "ssim", "l1"):  # every sample counted once
        assert measured[1][f"validation/{name}"] == pytest.approx(measured[0][f"validation/{name}"], rel=1e-4)
    one_sample = 1 / 63  # rounding may move one across the border between two classes; labels stay beside their latents
    assert measured[1]["validation/linear_probe"] == pytest.approx(
        measured[0]["validation/linear_probe"], abs=2.1 * one_sample
    )
