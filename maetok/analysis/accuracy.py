"""The accuracy of a classifier on held-out samples, with an interval for chance."""

from dataclasses import dataclass


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
        """Return the accuracy with Wilson's score interval (Wilson 1927).

        The interval also holds near 0 and 1 and for few samples. It covers the choice of held-out samples; it does not
        cover the choice of training samples or the training run.

        Raises:
            ValueError: unless 0 <= correct <= count and count >= 1.
        """
        from scipy.stats import binomtest

        if not 0 <= correct <= count or count < 1:
            raise ValueError(f"{correct} correct answers out of {count}: want 0 <= correct <= count and count >= 1")
        interval = binomtest(correct, count).proportion_ci(0.95, method="wilson")
        return cls(correct / count, float(interval.low), float(interval.high), count)
