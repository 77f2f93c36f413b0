"""A target from another file is one class path and one weight: an auxiliary decoder learns to predict it."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.support.extended_runs import moved, sample_images, terms_of, train

FLAGS = (
    '--model.init_args.targets={"mean_colour": {"class_path": "tests.extensions.target.MeanColourTarget"}}',
    '--model.init_args.target_weights={"mean_colour": 0.5}',
)


def test_an_auxiliary_decoder_predicts_it(tmp_path: Path, digits_root: Path) -> None:
    cli = train(tmp_path, digits_root, *FLAGS)
    decoder, images = cli.model.model.auxiliary_decoders["mean_colour"], sample_images()
    assert decoder.output.out_features == 3
    assert "model.auxiliary_decoders.mean_colour.output.weight" in moved(cli, tmp_path, "model.auxiliary_decoders.")
    logged = cli.trainer.callback_metrics
    expected = logged["train/reconstruction"] + 0.5 * logged["train/mean_colour"]
    torch.testing.assert_close(logged["train/loss"], expected)

    for parameter in decoder.output.parameters():
        parameter.data.zero_()  # it predicts 0 now, so the loss is the mean square of the masked patches
    mask = torch.zeros(3, 64, dtype=torch.bool)
    mask[:, ::3] = True
    colours = F.avg_pool2d(images, 8).flatten(2).transpose(1, 2)
    weight, term = terms_of(cli, images, mask)["mean_colour"]
    assert (weight, term.item()) == (0.5, pytest.approx(colours[mask].square().mean().item(), rel=1e-5))
    views = cli.model.views(images)
    torch.testing.assert_close(views["mean_colour"], F.avg_pool2d(images, 8))
