"""Mixtures on data whose number of modes and entropy are known, and against scikit-learn run by hand."""

import csv
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.mixture import GaussianMixture

from maetok.analysis.figures import mode_curves, pixels
from maetok.analysis.gmm import MixtureFit, fit_mixtures
from maetok.analysis.modes import ModeAnalysis, analyse_modes, read_json, table, write_csv, write_json
from maetok.analysis.projection import PrincipalComponents


def unit_gaussians(modes: int, samples: int, shape: tuple[int, int] = (2, 2), seed: int = 0) -> np.ndarray:
    """Draw latents of equally likely unit Gaussians with means at least 12 apart; the means ignore the seed."""
    rng, centres = np.random.default_rng(100), np.empty((0, *shape))
    while len(centres) < modes:
        candidate = rng.uniform(-20, 20, (1, *shape))
        if all(np.linalg.norm(candidate - centre) > 12 for centre in centres):
            centres = np.concatenate([centres, candidate])
    rng = np.random.default_rng(seed)
    return centres[rng.integers(modes, size=samples)] + rng.standard_normal((samples, *shape))


@pytest.mark.parametrize("modes", [2, 5, 10])
def test_known_modes_are_found_and_their_entropy_is_measured(modes: int) -> None:
    train, held_out = unit_gaussians(modes, 3000, seed=1), unit_gaussians(modes, 8000, seed=2)
    counts = [modes - 1, modes, modes + 1, 2 * modes]
    analysis = analyse_modes("known", train, held_out, counts, dimensions=4, restarts=5)
    assert analysis.modes_by_held_out_nll == modes
    assert analysis.modes_by_bic == modes
    entropy = np.log(modes) + 2 * np.log(2 * np.pi * np.e)  # modes in 4 dimensions do not overlap
    found = analysis.fits[1]
    assert found.nll_fit + analysis.log_scale == pytest.approx(entropy, rel=0.01)
    assert found.nll_held_out + analysis.log_scale == pytest.approx(entropy, rel=0.01)
    assert found.converged
    assert found.smallest_weight == pytest.approx(1 / modes, rel=0.2)


@pytest.mark.parametrize("covariance_type", ["full", "diag"])
def test_numbers_are_those_of_scikit_learn_by_hand(covariance_type: str) -> None:
    latents = unit_gaussians(6, 900, (3, 2)).astype(np.float32) * np.float32(0.7)
    options = {"covariance_type": covariance_type, "restarts": 4, "seed": 7, "max_iterations": 60}
    with torch.inference_mode():  # as in a validation
        analysis = analyse_modes("hand", latents[:600], latents[600:], [3, 11], 4, regularization=1e-4, **options)
    pca = PCA(4, svd_solver="full", whiten=True).fit(latents[:600].reshape(600, -1).astype(np.float64))
    train, held_out = (pca.transform(part.reshape(len(part), -1)) for part in (latents[:600], latents[600:]))
    assert analysis.explained_variance == pytest.approx(pca.explained_variance_ratio_.sum(), rel=1e-12)
    assert analysis.log_scale == pytest.approx(0.5 * np.log(pca.explained_variance_).sum(), rel=1e-10)
    assert (analysis.samples, analysis.held_out_samples, analysis.dimensions) == (600, 300, 4)
    for fit, components in zip(analysis.fits, (3, 11), strict=True):
        mixture = GaussianMixture(
            components, covariance_type=covariance_type, init_params="k-means++", n_init=4, random_state=7,
            max_iter=60, reg_covar=1e-4,
        ).fit(train)  # fmt: skip
        assert (fit.components, fit.iterations, fit.converged) == (components, mixture.n_iter_, mixture.converged_)
        assert fit.nll_fit == pytest.approx(-mixture.score(train), rel=1e-9)
        assert fit.nll_held_out == pytest.approx(-mixture.score(held_out), rel=1e-9)
        assert fit.bic == pytest.approx(mixture.bic(train), rel=1e-9)
        assert fit.largest_mean_norm == pytest.approx(np.linalg.norm(mixture.means_, axis=1).max(), rel=1e-9)
        assert fit.smallest_weight == pytest.approx(mixture.weights_.min(), rel=1e-9)


def test_one_component_is_the_normal_distribution_of_the_standardised_latents() -> None:
    train = unit_gaussians(3, 500)
    (fit,) = analyse_modes("one", train, train, [1], 3).fits
    variance = 499 / 500 + 1e-6  # the mixture divides by n, standardising by n - 1
    assert fit.nll_fit == pytest.approx(1.5 * (np.log(2 * np.pi * variance) + (499 / 500) / variance), rel=1e-9)
    assert (fit.smallest_weight, fit.largest_mean_norm) == (1, pytest.approx(0, abs=1e-12))
    assert fit.bic == pytest.approx(2 * 500 * fit.nll_fit + 9 * np.log(500), rel=1e-9)  # 3 means, 6 covariances


def test_a_count_gets_the_same_fit_beside_others_and_with_more_threads() -> None:
    points = unit_gaussians(4, 400).reshape(400, -1)
    alone = fit_mixtures(points[:300], points[300:], [9], restarts=2)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        together = fit_mixtures(points[:300], points[300:], [2, 9, 4], restarts=2)
    finally:
        torch.set_num_threads(threads)
    assert together[1] == alone[0]
    assert [fit.components for fit in together] == [2, 9, 4]


def test_stopping_early_and_dead_components_are_reported() -> None:
    points = unit_gaussians(5, 500).reshape(500, -1)
    (stopped,) = fit_mixtures(points, points, [20], max_iterations=2)
    assert (stopped.converged, stopped.iterations) == (False, 2)
    assert stopped.smallest_weight < 0.05


@pytest.mark.parametrize(("counts", "options", "message"), [
    ([2, 300], {}, "300 components cannot be fitted to 50 samples. Choose fewer components, or raise per_class"),
    ([0], {}, r"component_counts=\[0\] must be different numbers of at least 1"),
    ([3, 3], {}, r"component_counts=\[3, 3\] must be different numbers"),
    ([3], {"restarts": 0}, "restarts=0 must be at least 1"),
    ([3], {"regularization": 0.0}, "regularization=0.0 above 0"),
    ([3], {"dimensions": 5}, r"dimensions=5 must be 1 \.\.\. 4"),
    ([3], {"explained_variance": 90}, "explained_variance=90 must lie between 0 and 1"),
])  # fmt: skip
def test_what_cannot_be_fitted_is_refused(counts: list[int], options: dict, message: str) -> None:
    latents = unit_gaussians(2, 50)
    with pytest.raises(ValueError, match=message):
        analyse_modes("wrong", latents, latents, counts, **options)


def with_variances(variances: list[float], samples: int) -> np.ndarray:
    """Return samples (n, 2, d / 2) with exactly these variances along random orthogonal directions."""
    rng, dimensions = np.random.default_rng(0), len(variances)
    values = rng.standard_normal((samples, dimensions))
    columns = np.linalg.qr(values - values.mean(0))[0] * np.sqrt(samples - 1)  # uncorrelated, of unit variance
    rotation = np.linalg.qr(rng.standard_normal((dimensions, dimensions)))[0]
    return (columns * np.sqrt(variances) @ rotation).reshape(samples, 2, -1)


def test_principal_components_of_a_known_spectrum() -> None:
    latents = with_variances([4.0, 3.0, 2.0, 1.0], 50)
    components = PrincipalComponents.fit(latents)
    np.testing.assert_allclose(components.variances, [4, 3, 2, 1], rtol=1e-10)
    assert [components.dimensions(share) for share in (0.3, 0.41, 0.69, 0.71, 0.89, 0.91, 0.99)] == [
        1,
        2,
        2,
        3,
        3,
        4,
        4,
    ]
    assert components.explained_variance(2) == pytest.approx(0.7)
    assert components.log_scale(3) == pytest.approx(0.5 * np.log(24))
    standardised = components.standardised(latents, 3)
    np.testing.assert_allclose(np.cov(standardised.T), np.eye(3), atol=1e-10)
    np.testing.assert_allclose(standardised.mean(0), 0, atol=1e-10)


def test_fewer_samples_than_values_and_a_mean_far_from_zero() -> None:
    latents = with_variances([9.0, 4.0, 1.0, 0.25, 0.1, 0.05], 40)
    wide = np.concatenate([latents, np.zeros((40, 2, 60))], axis=2)  # 126 values, 6 of them vary
    near, far = PrincipalComponents.fit(wide), PrincipalComponents.fit(wide.astype(np.float32) + np.float32(1000))
    assert near.rank == 6
    np.testing.assert_allclose(near.variances[:6], [9, 4, 1, 0.25, 0.1, 0.05], rtol=1e-10)
    assert near.dimensions(0.999999) == 6
    np.testing.assert_allclose(far.variances[:4], [9, 4, 1, 0.25], rtol=1e-3)
    expected = np.abs(near.standardised(wide, 4))
    np.testing.assert_allclose(np.abs(far.standardised(wide + 1000, 4)), expected, atol=2e-3)
    with pytest.raises(ValueError, match=r"dimensions=7 must be 1 \.\.\. 6"):
        near.standardised(wide, 7)


def analyses() -> list[ModeAnalysis]:
    """Return the analyses of two tokenizers; rounding would change their numbers."""
    fits = tuple(
        MixtureFit(count, 1 / count, 2 - count / 7, 1e5 / 3 + count, 0.1, 1e-17, count < 5, 17) for count in (2, 5)
    )
    one = ModeAnalysis("one", 100, 50, 3, 0.9123456789012345, -1 / 3, "full", fits)
    better = replace(fits[0], nll_held_out=1.0), replace(fits[1], bic=1.0)
    return [one, replace(one, name="two", dimensions=4, fits=better)]


def test_json_and_csv_give_back_what_was_written(tmp_path: Path) -> None:
    written = analyses()
    write_json(written, tmp_path / "new" / "modes.json")
    assert read_json(tmp_path / "new" / "modes.json") == written
    estimates = [
        (values["modes_by_held_out_nll"], values["modes_by_bic"])
        for values in json.loads((tmp_path / "new" / "modes.json").read_text())
    ]
    assert estimates == [(5, 2), (2, 5)]
    write_csv(written, tmp_path / "other" / "modes.csv")
    with (tmp_path / "other" / "modes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["name"], row["components"]) for row in rows] == [
        ("one", "2"),
        ("one", "5"),
        ("two", "2"),
        ("two", "5"),
    ]
    expected = {key: value for key, value in asdict(written[1]).items() if key != "fits"} | asdict(written[1].fits[0])
    assert rows[2] == {key: str(value) for key, value in expected.items()}
    lines = table(written).splitlines()
    assert "modes: 5 by held-out NLL, 2 by BIC" in lines[0]
    assert lines[2].split() == ["2", "0.500", "1.714", "33335.3", "0.10", "0.00000", "yes"]


def test_figure_shows_both_curves_of_every_tokenizer() -> None:
    drawn = analyses()
    figure = mode_curves(drawn)
    (axes,) = figure.axes
    for number, analysis in enumerate(drawn):
        fitted, held_out, lowest = axes.lines[3 * number : 3 * number + 3]
        assert fitted.get_linestyle() == "--"
        assert held_out.get_linestyle() == "-"
        assert fitted.get_xydata().tolist() == [[fit.components, fit.nll_fit] for fit in analysis.fits]
        assert held_out.get_xydata().tolist() == [[fit.components, fit.nll_held_out] for fit in analysis.fits]
        assert lowest.get_xdata() == analysis.modes_by_held_out_nll
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["one (3 dimensions)", "two (4 dimensions)"]
    image = pixels(figure)
    assert (image.shape, image.dtype) == ((504, 768, 3), np.uint8)
    assert (image == [31, 119, 180]).all(-1).any()  # the first colour is there
