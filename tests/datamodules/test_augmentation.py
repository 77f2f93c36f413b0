"""Random numbers for augmentation are uniform and independent."""

import numpy as np
from scipy.stats import kstest

from datamodules.augmentation import uniform_numbers


def test_uniform_numbers_depend_on_each_part_and_are_uniform() -> None:
    epochs, indices = (part.reshape(-1) for part in np.meshgrid(np.arange(20), np.arange(5000)))
    numbers = uniform_numbers(3, epochs, indices, 4)
    assert numbers.shape == (100_000, 4)
    assert len(np.unique(numbers)) == 400_000
    again = uniform_numbers(3, epochs[77:78], indices[77:78], 4)
    assert np.array_equal(again[0], numbers[77])
    assert not np.intersect1d(uniform_numbers(4, epochs, indices, 4), numbers).size
    for column in numbers.T:
        assert kstest(column, "uniform").pvalue > 1e-3
    neighbours = numbers.reshape(5000, 20, 4)
    for one, other in (
        (neighbours[1:], neighbours[:-1]),
        (neighbours[:, 1:], neighbours[:, :-1]),
        (neighbours[..., 1:], neighbours[..., :-1]),
    ):
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.01
