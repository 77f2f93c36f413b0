"""Callbacks; classes named in configs are importable from here."""

from callbacks.checkpointing import ResumableCheckpoint
from callbacks.continued_curve import ContinuedCurve
from callbacks.early_signal import EarlySignal
from callbacks.gmm_modes import GMMModes
from callbacks.heartbeat import Heartbeat
from callbacks.image_metrics import ImageMetrics
from callbacks.interpolations import Interpolations
from callbacks.latent_pictures import LatentPictures
from callbacks.latent_writer import LatentWriter
from callbacks.linear_probe import LinearProbe
from callbacks.non_finite_guard import NonFiniteGuard
from callbacks.progress import StepProgressBar
from callbacks.reconstruction_metrics import ReconstructionMetrics
from callbacks.reconstruction_pictures import ReconstructionPictures
from callbacks.requeue import Requeue
from callbacks.run_report import RunReport
from callbacks.sample_metrics import SampleMetrics
from callbacks.sample_pictures import SamplePictures
from callbacks.sample_writer import SampleWriter
from callbacks.throughput import Throughput

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
