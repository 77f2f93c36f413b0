"""Inception gives the features of torch-fidelity and the ADM evaluation suite; errors name the remedy."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch_fidelity import feature_extractor_inceptionv3
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from maetok.metrics import InceptionFeatures
from tests.support.feature_networks import pictures


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a file in torch-fidelity's format, with random weights that keep the signal alive."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_extractor_inceptionv3, "load_state_dict_from_url", lambda *_, **__: None)
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network = FeatureExtractorInceptionV3("inception", ["2048"])
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(network.state_dict(), path)
    return path


def test_features_are_those_of_torch_fidelity(weights: Path) -> None:
    images = pictures(3, size=40)
    network = InceptionFeatures(str(weights)).eval()
    reference = FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], str(weights))
    with torch.no_grad():
        found, (pool, logits) = network(images), reference(images)
        x = interpolate_bilinear_2d_like_tensorflow1x(images.float(), size=(299, 299), align_corners=False)
        x = (x - 128) / 128
        for name, layer in reference.named_children():  # in their order in TensorFlow's graph
            if name == "Mixed_6d":  # mixed_6: the seventh of mixed, mixed_1 ...
                break
            x = layer(x)
        x = layer.branch1x1.bn(layer.branch1x1.conv(x)).relu()
    assert torch.equal(found["pool"], pool)
    assert torch.equal(found["logits"], logits)
    assert found["spatial"].shape == (3, 2023)
    assert found["spatial"].std() > 0.01
    # TensorFlow flattens 17 x 17 positions with channels last; the first seven channels count
    expected = torch.stack([x[:, channel] for channel in range(7)], dim=-1).reshape(3, -1)
    torch.testing.assert_close(found["spatial"], expected, atol=1e-6, rtol=1e-5)
    assert network.is_inception


def test_hash_is_that_of_the_weights(weights: Path, tmp_path: Path) -> None:
    state = torch.load(weights, weights_only=True)
    state["fc.weight"][0, 0] += 1
    torch.save(state, tmp_path / "other.pth")
    one, other = (InceptionFeatures(str(path)) for path in (weights, tmp_path / "other.pth"))
    assert one.name == other.name
    assert one.digest != other.digest


def test_missing_and_wrong_files_name_key_and_remedy(tmp_path: Path) -> None:
    remedy = r"nothing is downloaded.*weights-inception.*--weights.*EfficientNetLite0Features"
    with pytest.raises(FileNotFoundError, match=rf"InceptionFeatures\.weights_path=None.*{remedy}"):
        InceptionFeatures()
    with pytest.raises(FileNotFoundError, match=rf"weights_path=nowhere\.pth: no such file.*{remedy}"):
        InceptionFeatures("nowhere.pth")
    torch.save({"fc.weight": torch.zeros(1000, 2048)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"(?s)weights_path=.*other\.pth does not hold the weights.*fetch https"):
        InceptionFeatures(str(tmp_path / "other.pth"))
