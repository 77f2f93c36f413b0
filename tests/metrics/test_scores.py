"""Inception Score, precision and recall against constructed sets and brute force."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from maetok.metrics.inception_score import inception_score
from maetok.metrics.precision_recall import precision_recall


def test_inception_score_of_sure_and_of_clueless_networks() -> None:
    sure = torch.eye(10).repeat(30, 1) * 50
    assert inception_score(sure) == pytest.approx(10)
    assert inception_score(torch.zeros(20, 10)) == pytest.approx(1)
    # Half of the samples are 0 or 1 with equal probability, the others are 2: KL to (1/4, 1/4, 1/2) is log 2 for both.
    mixed = torch.tensor([[50.0, 50.0, 0.0], [0.0, 0.0, 50.0]]).repeat(8, 1)
    assert inception_score(mixed) == pytest.approx(2)
    assert inception_score(sure.reshape(30, 10, 10).transpose(0, 1).reshape(300, 10), 30) == pytest.approx(1)  # sorted
    with pytest.raises(ValueError, match="at least one sample"):
        inception_score(torch.zeros(0, 10))


def test_inception_score_is_the_mean_over_splits_of_which_the_last_is_smaller() -> None:
    logits = torch.randn(600, 50, generator=torch.Generator().manual_seed(0)) * 3
    for size in (600, 120, 250):
        scores = []
        for start in range(0, 600, size):
            log_p = logits[start : start + size].double().log_softmax(1)
            mean = log_p.exp().mean(0).log().expand_as(log_p)
            scores.append(F.kl_div(mean, log_p, reduction="batchmean", log_target=True).exp().item())
        assert len(scores) == {600: 1, 120: 5, 250: 3}[size]
        assert inception_score(logits, size) == pytest.approx(sum(scores) / len(scores), rel=1e-12)


def line(*places: float) -> Tensor:
    """Return points on the first of many axes."""
    return torch.tensor(places)[:, None] * torch.eye(40)[:1]


def test_precision_and_recall_of_constructed_sets_are_exact() -> None:
    near, far, elsewhere = (0, 1, 2, 3), (1000, 1001, 1002, 1003), (5000, 5001, 5002, 5003)
    assert precision_recall(line(*near), line(*far)) == (0, 0)
    assert precision_recall(line(*near), line(*near)) == (1, 1)
    # The manifold of the near points reaches from -3 to 6, ends included.
    real = line(*near, *far)
    assert precision_recall(line(-3, -3.5, 6, 6.5, *elsewhere), real) == (2 / 8, 4 / 8)
    # No sample lies on the manifold; the ball of each sample holds all near points.
    assert precision_recall(line(-4, 7, 7.5, 8), real) == (0, 4 / 8)
    # One reference stands alone: its ball reaches to its nearest neighbour at 3.
    assert precision_recall(line(*elsewhere, 5), line(*near, 10), neighbours=1) == (1 / 5, 5 / 5)
    with pytest.raises(ValueError, match="3 neighbours need more images than that, got 3 samples"):
        precision_recall(line(1, 2, 3), real)


def brute_force(features: Tensor, centres: Tensor, k: int) -> float:
    """Return the share of the features within the union of balls, one image at a time."""
    radii = [sorted((centre - other).norm().item() for other in centres)[k] for centre in centres]
    inside = [
        any((feature - centre).norm() <= radius for centre, radius in zip(centres, radii, strict=True))
        for feature in features
    ]
    return sum(inside) / len(inside)


@pytest.mark.parametrize("chunk", [7, 1000])
def test_precision_and_recall_equal_brute_force(chunk: int) -> None:
    rng = torch.Generator().manual_seed(0)
    samples = torch.randn(50, 5, generator=rng, dtype=torch.float64) * 0.7 + 0.4
    references = torch.randn(60, 5, generator=rng, dtype=torch.float64)
    for k in (1, 3):
        found = precision_recall(samples, references, k, chunk)
        assert found == (brute_force(samples, references, k), brute_force(references, samples, k))
        assert 0.1 < min(found) < max(found) < 1
