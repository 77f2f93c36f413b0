"""Inception Score (Salimans et al. 2016, arXiv 1606.03498, section 4)."""

import torch
from torch import Tensor

from maetok.metrics.metric import Batch, Metric, Rows


def inception_score(logits: Tensor, split_size: int = 5000) -> float:
    """Return exp(E_x KL(p(y|x) || p(y))), averaged over splits of consecutive samples, by torch-fidelity.

    The evaluation suite of ADM takes splits of 5,000 samples in stored order, and the last one may be smaller, where
    torch-fidelity alone would divide any number into equal splits. Samples sorted by class would score too low.

    Args:
        logits: (n, K) of Inception without bias, before the softmax.
        split_size: samples per split.

    Returns:
        Between 1 and K.

    Raises:
        ValueError: if there are no samples.
    """
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric

    if not len(logits):
        raise ValueError("an Inception Score needs at least one sample")
    scores = [
        isc_features_to_metric(part, splits=1, shuffle=False)[KEY_METRIC_ISC_MEAN] for part in logits.split(split_size)
    ]
    return torch.tensor(scores, dtype=torch.float64).mean().item()


class InceptionScore(Metric):
    """Measures the Inception Score of the samples; the references do not matter.

    4 KB per image are kept in main memory.

    Args:
        split_size: samples per split.
    """

    name = "inception_score"
    needs = ("logits",)

    def __init__(self, split_size: int = 5000) -> None:
        self.split_size = split_size

    def reset(self) -> None:
        """Forget all samples."""
        self.logits = Rows()

    def update(self, batch: Batch) -> None:
        """Keep the logits of the samples."""
        if batch.samples:
            self.logits.append(batch.indices, batch.samples["logits"])

    def compute(self) -> dict[str, float]:
        """Return the score of the samples in the order of their indices."""
        return {self.name: inception_score(self.logits.gather(), self.split_size)}
