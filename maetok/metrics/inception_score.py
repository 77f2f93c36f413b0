"""Inception Score (Salimans et al. 2016, arXiv 1606.03498, section 4)."""

import torch
from torch import Tensor


def inception_score(logits: Tensor, split_size: int = 5000) -> float:
    """exp(E_x KL(p(y|x) || p(y))) of each split of consecutive samples, averaged over the splits.

    The evaluation suite of ADM has splits of 5,000 samples in stored order, ten of them in 50,000; a last split may be
    smaller. Samples sorted by class would score too low.

    Args:
        logits: (n, K) of Inception without bias, before the softmax.
        split_size: samples per split.

    Returns:
        Between 1 and K.

    Raises:
        ValueError: if there are no samples.
    """
    if not len(logits):
        raise ValueError("an Inception Score needs at least one sample")
    scores = []
    for part in logits.split(split_size):
        log_p = part.double().log_softmax(dim=1)
        p = log_p.exp()
        divergence = (p * (log_p - p.mean(0).log())).sum(1).mean()
        scores.append(divergence.exp())
    return torch.stack(scores).mean().item()
