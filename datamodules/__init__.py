"""Data of the suite; nothing here imports the model code."""

from datamodules.digits import Digits
from datamodules.image_shards import ImageShards

__all__ = ["Digits", "ImageShards"]
