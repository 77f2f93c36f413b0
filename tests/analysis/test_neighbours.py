"""Nearest neighbours on constructed points, and against distances computed by hand."""

import numpy as np
import pytest

from maetok.analysis import neighbour_accuracy


def test_points_on_a_line() -> None:
    train, labels = np.array([[0.0], [1], [2], [10], [11], [12]]), np.array([0, 0, 0, 1, 1, 1])
    test, truth = np.array([[-1.0], [4], [7], [11]]), np.array([0, 0, 0, 1])  # 7 is nearer to the ones
    accuracy = neighbour_accuracy(train, labels, test, truth, neighbours=3, distance="euclidean")
    assert (accuracy.value, accuracy.count) == (0.75, 4)
    everything = neighbour_accuracy(train, labels, test, truth, neighbours=20, distance="euclidean")
    assert everything.value == 0.75  # a tie of three votes: the lower class wins


def test_cosine_sees_directions_and_not_lengths() -> None:
    """Classes are directions; the nearest point in Euclidean distance belongs to the other class."""
    train, labels = np.array([[10.0, 0], [-10, 0], [0, 1], [0, -1]]), np.array([0, 0, 1, 1])
    train = train / train.std(axis=0)  # so that standardising does not change them
    test, truth = np.array([[0.4, 0.1], [-0.4, 0.1]]), np.array([0, 0])
    test = test * 0.5
    assert neighbour_accuracy(train, labels, test, truth, neighbours=1).value == 1
    beside = np.array([[0.1, 1.0], [0.1, -1.0]])
    assert neighbour_accuracy(train, labels, beside, truth, neighbours=1).value == 0


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_agrees_with_all_distances_by_hand(distance: str) -> None:
    rng = np.random.default_rng(0)
    labels, truth = rng.integers(0, 2, 90), rng.integers(0, 2, 40)
    train = rng.normal(size=(90, 2, 3)) * np.arange(1, 4) + labels[:, None, None]
    test = rng.normal(size=(40, 2, 3)) * np.arange(1, 4) + truth[:, None, None]
    flat, other = train.reshape(90, 6), test.reshape(40, 6)
    flat, other = ((values - flat.mean(0)) / flat.std(0) for values in (flat, other))
    distances = np.linalg.norm(other[:, None] - flat, axis=2)
    if distance == "cosine":
        distances = -(other @ flat.T) / np.linalg.norm(flat, axis=1)
    nearest = np.argsort(distances, axis=1)[:, :7]
    expected = ((labels[nearest].mean(axis=1) > 0.5) == truth).mean()
    found = neighbour_accuracy(train, labels, test, truth, neighbours=7, distance=distance)
    assert found.value == pytest.approx(expected, abs=1e-12)
    assert found.value not in (0.0, 1.0)


def test_no_neighbours_are_refused() -> None:
    with pytest.raises(ValueError, match="neighbours=0 must be at least 1"):
        neighbour_accuracy(np.zeros((2, 1)), np.zeros(2), np.zeros((2, 1)), np.zeros(2), neighbours=0)
