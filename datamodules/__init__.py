"""Datamodules: images and latents in one exact, resumable order. Of ``maetok`` they import the formats only."""

from datamodules.digits import Digits
from datamodules.image_shards import ImageShards
from datamodules.images import ImageData, ImageIndex
from datamodules.latent_shards import LatentShards
from datamodules.sample_labels import SampleLabels
from datamodules.sharded import Loading
from datamodules.shards import Fault
from datamodules.staging import Staging

__all__ = [
    "Digits",
    "Fault",
    "ImageData",
    "ImageIndex",
    "ImageShards",
    "LatentShards",
    "Loading",
    "SampleLabels",
    "Staging",
]
