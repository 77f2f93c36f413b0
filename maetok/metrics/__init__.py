"""Metrics of reconstructions and samples."""

from maetok.metrics.features import EfficientNetLite0Features, TimmFeatures
from maetok.metrics.inception import InceptionFeatures
from maetok.metrics.reconstruction import reconstruction_metrics, to_uint8, to_unit_range

__all__ = [
    "EfficientNetLite0Features",
    "InceptionFeatures",
    "TimmFeatures",
    "reconstruction_metrics",
    "to_uint8",
    "to_unit_range",
]
