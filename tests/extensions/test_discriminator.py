"""A discriminator from another file is one class path: it is trained, and the autoencoder against it."""

from pathlib import Path

import pytest
import torch

from tests.extensions.discriminator import ColourDiscriminator
from tests.support.extended_runs import ADVERSARIAL, NO_TARGETS, moved, sample_images, train


def test_it_is_trained_against_the_autoencoder(tmp_path: Path, digits_root: Path) -> None:
    optimization = Path(__file__).parents[2] / "configs" / "optimization" / "digits.yaml"
    cli = train(
        tmp_path,
        digits_root,
        "--model.init_args.discriminator.class_path=tests.extensions.discriminator.ColourDiscriminator",
        f"--model.init_args.discriminator_optimization={optimization}",
        f"{ADVERSARIAL}.adversarial=0.1",
        *NO_TARGETS,
    )
    model, images = cli.model, sample_images()
    assert isinstance(model.discriminator, ColourDiscriminator)
    assert moved(cli, tmp_path, "discriminator.") == {"discriminator.judge.weight", "discriminator.judge.bias"}
    reconstructions = images.clone().requires_grad_()
    adversarial = model.objective.adversarial
    adversarial.augment = None
    term = adversarial.autoencoder(model.discriminator, reconstructions, torch.zeros(3, 7))
    judged = images.mean((2, 3)) @ model.discriminator.judge.weight.T + model.discriminator.judge.bias
    assert term.item() == pytest.approx(-judged.mean().item(), rel=1e-4, abs=1e-7)
    term.backward()
    expected = -model.discriminator.judge.weight[0] / (3 * 64 * 64)
    torch.testing.assert_close(reconstructions.grad[1, :, 5, 9], expected.detach())
    logged = cli.trainer.callback_metrics
    assert logged["discriminator/adversarial"] > 0
    assert logged["train/adversarial"] != 0
    torch.testing.assert_close(
        logged["train/loss"],
        logged["train/reconstruction"] + 0.1 * logged["train/adaptive_weight"] * logged["train/adversarial"],
    )
