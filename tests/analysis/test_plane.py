"""Latents in the plane: exact principal components, separate clusters in t-SNE, and class colours."""

import numpy as np
import pytest

from maetok.analysis.plane import draw_classes, principal_components, tsne


def clusters(samples: int = 60, classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    labels = np.arange(samples) % classes
    noise = np.random.default_rng(0).normal(size=(samples, 4, 5))
    return (20 * np.eye(20)[labels].reshape(samples, 4, 5) + noise).astype(np.float32), labels


def test_principal_components_are_those_of_the_singular_value_decomposition() -> None:
    latents, _ = clusters()
    found = principal_components(latents, 3)
    flat = latents.reshape(60, 20).astype(np.float64)
    left, singular, _ = np.linalg.svd(flat - flat.mean(0), full_matrices=False)
    np.testing.assert_allclose(np.abs(found), np.abs(left[:, :3] * singular[:3]), atol=1e-3)
    assert principal_components(latents).shape == (60, 20)
    assert principal_components(latents[:7]).shape == (7, 7)


def test_tsne_keeps_clusters_apart_and_repeats_itself() -> None:
    latents, labels = clusters()
    points = tsne(principal_components(latents))
    centres = np.stack([points[labels == label].mean(0) for label in range(3)])
    nearest = np.linalg.norm(points[:, None] - centres, axis=2).argmin(1)
    assert (nearest == labels).all()
    assert np.array_equal(points, tsne(principal_components(latents)))


@pytest.mark.parametrize("panels", [1, 2])
def test_every_class_is_drawn_in_its_own_colour(panels: int) -> None:
    points = np.array([[0.0, 0.0], [1.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    picture = draw_classes({f"panel {number}": points for number in range(panels)}, np.array([0, 0, 1, 2]), side=200)
    assert (picture.shape, picture.dtype) == ((200, 200 * panels, 3), np.uint8)
    counts = [(picture == colour).all(-1).sum() for colour in ([31, 119, 180], [255, 127, 14], [44, 160, 44])]
    assert all(count > 0 for count in counts)  # the first colours of matplotlib's tab10
    assert counts[0] > counts[1]  # twice as many points
    assert (picture == [214, 39, 40]).all(-1).sum() == 0  # there is no fourth class
