"""Metrics of reconstructions and samples."""

from maetok.metrics.features import EfficientNetLite0Features, TimmFeatures
from maetok.metrics.inception import InceptionFeatures
from maetok.metrics.metric import Batch, MeanOverPairs, Metric, Rows, UnavailableError
from maetok.metrics.reconstruction import reconstruction_metrics, to_uint8, to_unit_range

__all__ = [
    "Batch",
    "EfficientNetLite0Features",
    "InceptionFeatures",
    "MeanOverPairs",
    "Metric",
    "Rows",
    "TimmFeatures",
    "UnavailableError",
    "reconstruction_metrics",
    "to_uint8",
    "to_unit_range",
]
