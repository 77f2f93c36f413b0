"""The class-balanced choice takes each sample at most once and with equal probability."""

import numpy as np
import pytest

from maetok.analysis.subsets import class_balanced

LABELS = np.random.default_rng(0).permutation(np.repeat([7, 0, 3], [50, 4, 20]))


@pytest.mark.parametrize(("per_class", "counts"), [(10, [4, 10, 10]), (30, [4, 20, 30]), (1, [1, 1, 1])])
def test_every_class_gives_the_same_number_or_all_it_has(per_class: int, counts: list[int]) -> None:
    chosen = class_balanced(LABELS, per_class, seed=1)
    assert np.unique(LABELS[chosen], return_counts=True)[1].tolist() == counts
    assert (np.diff(chosen) > 0).all()  # sorted, none twice
    assert np.array_equal(chosen, class_balanced(LABELS, per_class, seed=1))
    assert per_class == 30 or not np.array_equal(chosen, class_balanced(LABELS, per_class, seed=2))


def test_members_of_a_class_are_equally_likely() -> None:
    counts = np.bincount(np.concatenate([class_balanced(LABELS, 5, seed) for seed in range(2000)]), minlength=74)
    for label, size in ((7, 50), (3, 20)):
        expected = 2000 * 5 / size
        found = counts[label == LABELS]
        assert np.abs(found - expected).max() < 5 * np.sqrt(expected)
    assert (counts[LABELS == 0] == 2000).all()  # four of five are taken


def test_no_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="per_class=0 must be at least 1"):
        class_balanced(LABELS, 0)
