"""Moments and effective ranks against closed forms and SciPy."""

import json
from dataclasses import asdict

import numpy as np
import pytest
from scipy.stats import kurtosis

from maetok.analysis.latent_summary import LatentSummary, effective_rank, excess_kurtosis


@pytest.mark.parametrize("width", [1, 3, 8])
def test_rank_of_an_isotropic_covariance_is_the_number_of_dimensions(width: int) -> None:
    points = np.concatenate((np.eye(width), -np.eye(width)))
    assert effective_rank(points * 7 + 3) == pytest.approx(width, rel=1e-12)


def test_rank_of_points_on_a_line_is_one_and_of_one_point_zero() -> None:
    line = np.random.default_rng(0).normal(size=(50, 1)) * np.arange(1.0, 6.0) + 2
    assert effective_rank(line) == pytest.approx(1, rel=1e-12)
    assert effective_rank(line[:4]) == pytest.approx(1, rel=1e-12)  # fewer samples than dimensions
    assert effective_rank(np.ones((4, 3))) == 0


def test_rank_of_known_eigenvalues_is_exp_of_their_entropy() -> None:
    axes = np.concatenate((np.eye(2), -np.eye(2))) * np.sqrt([3.0, 1.0])
    expected = np.exp(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25)))
    assert effective_rank(axes) == pytest.approx(expected, rel=1e-12)


def test_fewer_samples_than_dimensions_give_at_most_one_less_than_samples() -> None:
    """The corners of a simplex vary equally along all n - 1 directions."""
    assert effective_rank(np.eye(5, 40)) == pytest.approx(4, rel=1e-12)


def test_kurtosis_of_known_distributions() -> None:
    number = 101
    discrete_uniform = -1.2 * (number**2 + 1) / (number**2 - 1)
    assert excess_kurtosis(np.linspace(-3.0, 5.0, number)) == pytest.approx(discrete_uniform, rel=1e-12)
    assert excess_kurtosis(np.array([4.0, 6.0, 6.0, 4.0])) == -2
    normal = np.random.default_rng(0).normal(size=200_000).astype(np.float32)
    assert abs(excess_kurtosis(normal)) < 0.05  # its standard error is 0.011
    assert excess_kurtosis(np.full(5, 2.0)) == 0


def test_statistics_of_latents_go_to_json_and_back() -> None:
    latents = np.random.default_rng(0).exponential(size=(40, 5, 3)).astype(np.float32) * [1, 2, 0]
    statistics = LatentSummary.of(latents)
    assert LatentSummary(**json.loads(json.dumps(asdict(statistics)))) == statistics
    flat = latents.reshape(-1, 3)
    np.testing.assert_allclose(statistics.mean, flat.mean(0), rtol=1e-6)
    np.testing.assert_allclose(statistics.std, flat.std(0), rtol=1e-6)
    np.testing.assert_allclose(statistics.excess_kurtosis[:2], kurtosis(flat[:, :2], axis=0), rtol=1e-6)
    assert statistics.excess_kurtosis[2] == 0
    assert statistics.count == 40
    assert statistics.effective_rank_of_channels == pytest.approx(effective_rank(flat[:, :2]), rel=1e-12)
    assert 5 < statistics.effective_rank < 10  # ten values vary, five of them twice as much
