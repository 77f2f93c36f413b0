"""Analysis of latent spaces."""

from maetok.analysis.linear_probe import linear_probe_accuracy

__all__ = ["linear_probe_accuracy"]
