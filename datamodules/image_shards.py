"""Images with labels from WebDataset shards, as a LightningDataModule."""

from collections.abc import Collection
from typing import Any

from torch.utils.data import DataLoader

from datamodules.base import ImageBatch, Split
from datamodules.images import ImageData
from datamodules.remote import is_remote
from datamodules.shard_index import ShardIndex
from datamodules.shards import ShardError
from datamodules.staging import Staging


class ImageShards(ImageData):
    """Training and validation images from tar shards that hold jpg, png or webp members with cls members.

    Missing or damaged shards are errors before any training.

    Args:
        train_shards: training shards: a path or URL with wildcards ``*?[]`` or braces ``{000000..000009}``.
        validation_shards: the same for validation.
        staging: node-local folder and size limit for remote shards.
        **kwargs: see :class:`datamodules.images.ImageData`.
    """

    def __init__(
        self, train_shards: str, validation_shards: str, staging: Staging | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.patterns: dict[Split, str] = {"train": train_shards, "validation": validation_shards}
        self.staging = staging
        self.finished_shards: dict[Split, Collection[int]] = {"train": (), "validation": ()}

    def setup(self, stage: str) -> None:
        """Index the shards and check that they belong together.

        Raises:
            ShardError: if a shard is missing or damaged, the splits have other classes, or staging has too little room.
        """
        if "train" in self.splits(stage):
            self.check_staging_limit()
        super().setup(stage)
        names = {tuple(index.class_names) for index in self.indices.values() if index.class_names}
        if len(names) > 1:
            raise ShardError(
                f"train_shards and validation_shards name different classes ({self.patterns['train']} and "
                f"{self.patterns['validation']}), so labels do not mean the same: pack both from the same class folders"
            )

    def check_staging_limit(self) -> None:
        """Raise ShardError if the shards whose samples are shuffled together exceed the staging limit."""
        sizes = sorted(self.index("train").shard_bytes, reverse=True)
        needed = sum(sizes[: self.shuffle_window]) / 1e9
        limit = self.staging.limit_gigabytes if self.staging else None
        if limit is not None and is_remote(self.patterns["train"]) and needed > limit:
            raise ShardError(
                f"data.init_args.staging.limit_gigabytes={limit} cannot hold the shards that are shuffled together "
                f"({needed:.3g} GB with data.init_args.shuffle_window={self.shuffle_window}), so that they would be "
                "downloaded again and again: raise the limit, or set a smaller shuffle_window"
            )

    def load_index(self, split: Split) -> ShardIndex:
        """Find the shards of a split and index their samples."""
        config_key = f"data.init_args.{split}_shards"
        rate = self.faults.max_fault_rate
        return ShardIndex.load(self.patterns[split], config_key, self.num_classes, rate, self.staging)

    def predict_dataloader(self) -> list[DataLoader[ImageBatch]]:
        """Read training, then validation images without augmentation, shard by shard, without ``finished_shards``."""
        loaders = []
        for split, finished in self.finished_shards.items():
            shards = [shard for shard in range(len(self.index(split).paths)) if shard not in finished]
            loaders.append(self.shardwise_dataloader(split, shards))
        return loaders
