"""Callbacks; classes named in configs are importable from here."""

from callbacks.checkpointing import ResumableCheckpoint
from callbacks.linear_probe import LinearProbe
from callbacks.progress import StepProgressBar, Throughput
from callbacks.reconstruction_metrics import ReconstructionMetrics
from callbacks.reconstruction_pictures import ReconstructionPictures
from callbacks.run_report import RunReport

__all__ = [
    "LinearProbe",
    "ReconstructionMetrics",
    "ReconstructionPictures",
    "ResumableCheckpoint",
    "RunReport",
    "StepProgressBar",
    "Throughput",
]
