"""A teacher from another file is one class path: it is frozen, stays out of checkpoints, and is predicted."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from maetok.checkpoints.files import read_weights
from tests.extensions.teacher import EdgeModel
from tests.support.extended_runs import sample_images, terms_of, train

FLAGS = (
    '--model.init_args.targets={"edges": {"class_path": "tests.extensions.teacher.EdgeTeacher"}}',
    '--model.init_args.target_weights={"edges": 1.0}',
)


def test_its_features_are_predicted_and_it_stays_as_it_was(tmp_path: Path, digits_root: Path) -> None:
    cli = train(tmp_path, digits_root, *FLAGS)
    target, images = cli.model.targets["edges"], sample_images()
    features = target(images)
    exact = F.interpolate(EdgeModel().filters(images), size=(8, 8), mode="bilinear", align_corners=False)
    torch.testing.assert_close(features, exact.flatten(2).transpose(1, 2).detach())
    teacher = target.features.network.model
    assert torch.equal(teacher.filters.weight, EdgeModel().filters.weight)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    (checkpoint, *_) = sorted((tmp_path / "checkpoints").glob("*.ckpt"))
    assert not [name for name in read_weights(checkpoint) if "filters" in name]
    decoder = cli.model.model.auxiliary_decoders["edges"]
    decoder.output.weight.data.zero_()
    decoder.output.bias.data.copy_(torch.tensor([1.0, 0.0]))  # every prediction points along the first filter
    _, term = terms_of(cli, images)["edges"]
    assert term.item() == pytest.approx(-(features[..., 0] / features.norm(dim=-1)).mean().item(), rel=1e-5)
