"""Callbacks; classes named in configs are importable from here."""

from callbacks.checkpointing import ResumableCheckpoint
from callbacks.early_signal import EarlySignal
from callbacks.gmm_modes import GMMModes
from callbacks.image_metrics import ImageMetrics
from callbacks.interpolations import Interpolations
from callbacks.latent_pictures import LatentPictures
from callbacks.latent_writer import LatentWriter
from callbacks.linear_probe import LinearProbe
from callbacks.progress import StepProgressBar, Throughput
from callbacks.reconstruction_metrics import ReconstructionMetrics
from callbacks.reconstruction_pictures import ReconstructionPictures
from callbacks.run_report import RunReport
from callbacks.sample_metrics import SampleMetrics
from callbacks.sample_pictures import SamplePictures
from callbacks.sample_writer import SampleWriter

__all__ = [
    "EarlySignal",
    "GMMModes",
    "ImageMetrics",
    "Interpolations",
    "LatentPictures",
    "LatentWriter",
    "LinearProbe",
    "ReconstructionMetrics",
    "ReconstructionPictures",
    "ResumableCheckpoint",
    "RunReport",
    "SampleMetrics",
    "SamplePictures",
    "SampleWriter",
    "StepProgressBar",
    "Throughput",
]
