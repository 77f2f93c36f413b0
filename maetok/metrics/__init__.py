"""Metrics of reconstructions and samples."""

from maetok.metrics.reconstruction import reconstruction_metrics, to_unit_range

__all__ = ["reconstruction_metrics", "to_unit_range"]
