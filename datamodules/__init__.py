"""Data of the suite; nothing here imports the model code."""

from datamodules.digits import Digits
from datamodules.image_shards import ImageShards
from datamodules.latent_shards import LatentShards
from datamodules.sample_labels import SampleLabels
from datamodules.sharded import Loading
from datamodules.staging import Staging

__all__ = ["Digits", "ImageShards", "LatentShards", "Loading", "SampleLabels", "Staging"]
