"""A bottleneck from another file is one class path: its loss is trained and logged, its latents are cached."""

from pathlib import Path

import pytest
import torch

from tests.extensions.bottleneck import BoundedBottleneck
from tests.support.extended_runs import NO_TARGETS, moved, sample_images, terms_of, train

PATH = "--model.init_args.tokenizer.init_args.bottleneck"


def test_its_loss_is_trained_and_its_latents_are_bounded(tmp_path: Path, digits_root: Path) -> None:
    flags = [f"{PATH}=tests.extensions.bottleneck.BoundedBottleneck", f"{PATH}.init_args.weight=0.25"]
    cli = train(tmp_path, digits_root, *flags, *NO_TARGETS)
    tokenizer, images = cli.model.model.tokenizer, sample_images()
    assert isinstance(tokenizer.bottleneck, BoundedBottleneck)
    latents = tokenizer.encode(images)
    assert latents.shape == (3, 16, tokenizer.latent_channels)
    assert latents.abs().max() < 1
    weight, energy = terms_of(cli, images)["energy"]
    assert (weight, energy.item()) == (1.0, pytest.approx(0.25 * latents.square().mean().item(), rel=1e-6))
    logged = cli.trainer.callback_metrics
    expected = logged["train/reconstruction"] + logged["train/energy"]
    torch.testing.assert_close(logged["train/loss"], expected)
    assert moved(cli, tmp_path, "model.tokenizer.bottleneck.") == {
        "model.tokenizer.bottleneck.projection.weight",
        "model.tokenizer.bottleneck.projection.bias",
    }
