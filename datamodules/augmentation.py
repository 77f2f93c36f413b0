"""Random numbers for augmentation that depend on (seed, epoch, sample) alone, so that a resumed run repeats them."""

import numpy as np

SPLITMIX_STEP = np.uint64(0x9E3779B97F4A7C15)


def uniform_numbers(seed: int, epochs: np.ndarray, indices: np.ndarray, count: int) -> np.ndarray:
    """Return random numbers in [0, 1) that are a function of (seed, epoch, sample) alone.

    A hash (the output function of SplitMix64, Steele, Lea and Flood 2014) serves a whole batch at once.
    Constructing a generator for each sample would take a tenth of the time of decoding it.

    Args:
        seed: any non-negative integer below 2^63.
        epochs: (B,) int64.
        indices: (B,) int64.
        count: numbers per sample.

    Returns:
        (B, count) float64.
    """
    state = np.full(len(indices), seed, dtype=np.uint64)
    for part in (epochs, indices):
        state = scramble(state + SPLITMIX_STEP) ^ part.astype(np.uint64)
    state = scramble(state + SPLITMIX_STEP)
    numbers = scramble(state[:, None] + np.arange(1, count + 1, dtype=np.uint64) * SPLITMIX_STEP)
    return (numbers >> np.uint64(11)).astype(np.float64) * 2.0**-53


def scramble(values: np.ndarray) -> np.ndarray:
    """Apply SplitMix64's output function to uint64, which wraps around."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
