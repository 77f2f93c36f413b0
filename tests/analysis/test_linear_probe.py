"""The linear probe on features with a known best linear classifier."""

import numpy as np
import pytest

from maetok.analysis import linear_probe_accuracy
from maetok.analysis.accuracy import Accuracy


def probe(features: np.ndarray, labels: np.ndarray, **options) -> Accuracy:
    return linear_probe_accuracy(features[:400], labels[:400], features[400:], labels[400:], **options)


def test_what_is_separable_is_separated_and_noise_is_not() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 600)
    separable = np.eye(3)[labels] * 6 + rng.normal(size=(600, 3))
    found = probe(separable, labels)
    assert found.value > 0.97
    assert found == Accuracy.of(round(found.value * 200), 200)
    chance = probe(np.random.default_rng(1).normal(size=(600, 2, 3)), labels)
    assert chance.low < 1 / 3 < chance.high


def test_views_see_what_they_should() -> None:
    """A class sign that is opposite in two tokens vanishes in their mean; an equal sign stays."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 600)
    noise, sign = rng.normal(size=(600, 2, 3)), (2.0 * labels - 1)[:, None, None]
    opposite = 4 * sign * np.array([1.0, -1.0])[:, None] + noise
    assert probe(opposite, labels).value == 1
    pooled = probe(opposite, labels, view="pooled")
    assert pooled.low < 0.5 < pooled.high
    assert probe(4 * sign + noise, labels, view="pooled").value == 1


def test_pooled_view_is_the_probe_of_the_mean() -> None:
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, 600)
    latents = rng.normal(size=(600, 4, 3)) + 0.5 * labels[:, None, None]
    assert probe(latents, labels, view="pooled") == probe(latents.mean(axis=1), labels)


def test_a_single_class_is_predicted_without_learning() -> None:
    labels = np.where(np.arange(600) < 500, 3, 4)
    assert probe(np.zeros((600, 2)), labels) == Accuracy.of(100, 200)


def test_features_do_not_have_to_be_scaled() -> None:
    rng = np.random.default_rng(2)
    labels = rng.integers(0, 2, 600)
    features = rng.normal(size=(600, 5)) + labels[:, None]
    scaled = probe(features * 10.0 ** np.arange(-4, 6, 2) + 3, labels)
    assert scaled.value == pytest.approx(probe(features, labels).value, abs=0.005)
