"""The accuracy of a classifier on held-out samples, and how far chance may have moved it."""

import math
from dataclasses import dataclass
from statistics import NormalDist

QUANTILE = NormalDist().inv_cdf(0.975)
"""Of the standard normal distribution for two-sided intervals of 95 %, 1.96."""


@dataclass(frozen=True)
class Accuracy:
    """Share of correct answers with its 95 % interval, all in [0, 1]."""

    value: float
    low: float
    high: float
    count: int
    """Number of answers."""

    @classmethod
    def of(cls, correct: int, count: int) -> "Accuracy":
        """Accuracy and Wilson's score interval (Wilson 1927), which holds near 0 and 1 and for few samples as well.

        The interval covers the choice of held-out samples, not that of the training samples or the training run.

        Raises:
            ValueError: unless 0 <= correct <= count and count >= 1.
        """
        if not 0 <= correct <= count or count < 1:
            raise ValueError(f"{correct} correct answers out of {count}: want 0 <= correct <= count and count >= 1")
        share, square = correct / count, QUANTILE**2
        centre = (correct + square / 2) / (count + square)
        half = QUANTILE / (count + square) * math.sqrt(count * share * (1 - share) + square / 4)
        return cls(share, max(0.0, centre - half), min(1.0, centre + half), count)
