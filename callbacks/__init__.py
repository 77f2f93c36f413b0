"""Callbacks; classes named in configs are importable from here."""

from callbacks.measures.early_signal import EarlySignal
from callbacks.measures.gmm_modes import GMMModes
from callbacks.measures.image_metrics import ImageMetrics
from callbacks.measures.linear_probe import LinearProbe
from callbacks.measures.reconstruction_metrics import ReconstructionMetrics
from callbacks.measures.sample_metrics import SampleMetrics
from callbacks.pictures.interpolations import Interpolations
from callbacks.pictures.latents import LatentPictures
from callbacks.pictures.reconstructions import ReconstructionPictures
from callbacks.pictures.samples import SamplePictures
from callbacks.reporting.progress import StepProgressBar
from callbacks.reporting.run_report import RunReport
from callbacks.reporting.throughput import Throughput
from callbacks.resilience.checkpointing import ResumableCheckpoint
from callbacks.resilience.continued_curve import ContinuedCurve
from callbacks.resilience.heartbeat import Heartbeat
from callbacks.resilience.non_finite_guard import NonFiniteGuard
from callbacks.resilience.requeue import Requeue
from callbacks.writers.latents import LatentWriter
from callbacks.writers.samples import SampleWriter
from maetok.runtime.renamed import MovedCommands

__all__ = [
    "ContinuedCurve",
    "EarlySignal",
    "GMMModes",
    "Heartbeat",
    "ImageMetrics",
    "Interpolations",
    "LatentPictures",
    "LatentWriter",
    "LinearProbe",
    "NonFiniteGuard",
    "ReconstructionMetrics",
    "ReconstructionPictures",
    "Requeue",
    "ResumableCheckpoint",
    "RunReport",
    "SampleMetrics",
    "SamplePictures",
    "SampleWriter",
    "StepProgressBar",
    "Throughput",
]

MovedCommands({"callbacks.compare_runs": "tools.compare_runs"}).register()
