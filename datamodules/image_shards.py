"""Images with labels from WebDataset shards, as a LightningDataModule."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from datamodules.augmentation import uniform_numbers
from datamodules.base import ImageBatch, Split, to_model_input
from datamodules.faults import FaultMonitor
from datamodules.order import BatchReference
from datamodules.remote import is_remote
from datamodules.shard_index import ShardIndex
from datamodules.sharded import Loading, ShardedData
from datamodules.shards import Fault, ShardError
from datamodules.staging import Staging
from maetok.formats.crops import CENTER_CROP, center_crop, random_crop

REPLACEMENTS = 20  # samples tried in place of a broken one


class ImageShardDataset(Dataset[ImageBatch]):
    """Reads a whole batch of samples at once; augmentation depends on (seed, epoch, sample) and nothing else.

    Args:
        index: where the samples lie.
        image_size: (height, width) of the images.
        seed: seed of the augmentation.
        training: replace broken samples by others, drawn by (seed, epoch, sample); otherwise mark them as not valid.
        horizontal_flip: mirror half of the images.
        random_crop_scale: share of the short side that a random crop covers; ``None`` for the centre crop.
    """

    def __init__(
        self,
        index: ShardIndex,
        image_size: tuple[int, int],
        seed: int = 0,
        training: bool = False,
        horizontal_flip: bool = False,
        random_crop_scale: tuple[float, float] | None = None,
    ) -> None:
        self.index, self.image_size, self.seed, self.training = index, image_size, seed, training
        self.horizontal_flip, self.random_crop_scale = horizontal_flip, random_crop_scale

    def image(self, index: int, uniform: Sequence[float]) -> Tensor | Fault:
        """(3, H, W) uint8 of one sample, augmented by four uniform numbers, or why there is none."""
        from maetok.formats import pictures  # imports torchvision, which takes a second: only where images are read

        try:
            image = pictures.decode(self.index.read(index))
        except pictures.UndecodableImageError as error:
            return self.index.fault(index, "corrupt_image", error)
        except (ShardError, OSError) as error:
            return self.index.fault(index, "unreadable", error)
        if self.random_crop_scale is None:
            image = center_crop(image, self.image_size)
        else:
            image = random_crop(image, self.image_size, self.random_crop_scale, uniform)
        return image.flip(-1) if self.horizontal_flip and uniform[3] < 0.5 else image

    def sample(self, index: int, uniform: Sequence[float], faults: list[Fault]) -> tuple[int, Tensor | None]:
        """Index and image of a sample, or of the one that replaces it; (-1, None) for nothing. Faults are appended.

        Raises:
            ShardError: if all that could replace a broken training sample are broken as well.
        """
        if index < 0:
            return -1, None
        image = self.image(index, uniform)
        if isinstance(image, Tensor):
            return index, image
        faults.append(image)
        if not self.training:
            return -1, None
        rng = np.random.Generator(np.random.PCG64(np.array(uniform).view(np.uint64)))
        for candidate in rng.integers(len(self.index), size=REPLACEMENTS).tolist():
            image = self.image(candidate, uniform)
            if isinstance(image, Tensor):
                return candidate, image
            faults.append(image)
        raise ShardError(f"{1 + REPLACEMENTS} samples in a row cannot be read, the last: {faults[-1]}")

    def __getitems__(self, reference: BatchReference) -> dict[str, Any]:
        """One batch, in the order of the reference; the loader makes tensors of its arrays."""
        # Channels last, as decoders give them: turning them around here would take a quarter of the time of decoding.
        pixels = torch.empty(len(reference.indices), *self.image_size, 3, dtype=torch.uint8)
        if get_worker_info() is not None:
            pixels.share_memory_()  # where it has to go anyway, so that it is not copied there
        images = pixels.permute(0, 3, 1, 2)
        indices = np.full_like(reference.indices, -1)
        faults: list[Fault] = []
        uniform = uniform_numbers(self.seed, reference.epochs, reference.indices, 4).tolist()
        for place, index in enumerate(reference.indices.tolist()):
            indices[place], image = self.sample(index, uniform[place], faults)
            images[place] = 0 if image is None else image
        valid = indices >= 0
        return {
            "images": images,
            "labels": np.where(valid, self.index.label[indices], 0),
            "indices": indices,
            "valid": valid,
            "position": reference.position,
            "faults": faults,
        }


class ImageShards(ShardedData):
    """Training and validation images from tar shards that hold jpg, png or webp plus cls.

    Broken samples are left out, counted by reason, logged and listed in ``data_faults.jsonl``; in training another
    sample takes the place of one that cannot be decoded. Missing or damaged shards are errors before any training.

    Args:
        train_shards: training shards: a path or URL with wildcards ``*?[]`` or braces ``{000000..000009}``.
        validation_shards: the same for validation.
        image_size: side or (height, width) of the images handed out.
        num_classes: labels must lie in 0 ... num_classes - 1.
        batch_size: samples per micro-batch over all processes.
        evaluation_batch_size: the same for evaluation; ``batch_size`` if not given.
        loading: worker processes, prefetching, pinned memory.
        horizontal_flip: mirror half of the training images.
        random_crop_scale: share of the short side that a random training crop covers, e.g. [0.8, 1.0]; null for the
            centre crop, which evaluation always uses.
        shuffle_window: shards that are shuffled together; null for all. See docs/data.md.
        drop_tail: leave out what does not fill the last batch of an epoch; otherwise that batch goes on into the next.
        max_fault_rate: share of broken samples above which the run stops.
        staging: node-local folder and size limit for remote shards.
        seed: seed of order and augmentation; ``seed_everything`` if not given.

    Raises:
        ValueError: if ``random_crop_scale`` is no range of shares.
    """

    def __init__(
        self,
        train_shards: str,
        validation_shards: str,
        image_size: int | tuple[int, int] = 256,
        num_classes: int = 1000,
        batch_size: int = 256,
        evaluation_batch_size: int | None = None,
        loading: Loading = Loading(),  # noqa: B008 - frozen
        horizontal_flip: bool = True,
        random_crop_scale: tuple[float, float] | None = None,
        shuffle_window: int | None = None,
        drop_tail: bool = False,
        max_fault_rate: float = 0.001,
        staging: Staging | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(batch_size, evaluation_batch_size, loading, shuffle_window, drop_tail, seed)
        if random_crop_scale is not None and not 0 < random_crop_scale[0] <= random_crop_scale[1] <= 1:
            raise ValueError(f"data.init_args.random_crop_scale={random_crop_scale} needs 0 < low <= high <= 1")
        self.patterns: dict[Split, str] = {"train": train_shards, "validation": validation_shards}
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.num_classes, self.staging = num_classes, staging
        self.horizontal_flip, self.random_crop_scale = horizontal_flip, random_crop_scale
        self.faults = FaultMonitor(max_fault_rate)
        self.indices: dict[Split, ShardIndex] = {}
        self.finished_shards: dict[Split, Collection[int]] = {"train": (), "validation": ()}

    def setup(self, stage: str) -> None:
        """Index what the subcommand reads; a missing or damaged shard is an error here, before any training."""
        splits: tuple[Split, ...] = ("train", "validation") if stage in ("fit", "predict") else ("validation",)
        if "train" in splits:
            self.check_staging_limit()
        names = {tuple(index.class_names) for split in splits if (index := self.index(split)).class_names}
        if len(names) > 1:
            raise ShardError(
                f"train_shards and validation_shards name different classes ({self.patterns['train']} and "
                f"{self.patterns['validation']}), so labels do not mean the same: pack both from the same class folders"
            )

    def check_staging_limit(self) -> None:
        """Raise ShardError if the shards whose samples are shuffled together do not fit into the staging limit."""
        sizes = sorted(self.index("train").shard_bytes, reverse=True)
        needed = sum(sizes[: self.shuffle_window]) / 1e9
        limit = self.staging.limit_gigabytes if self.staging else None
        if limit is not None and is_remote(self.patterns["train"]) and needed > limit:
            raise ShardError(
                f"data.init_args.staging.limit_gigabytes={limit} cannot hold the shards that are shuffled together "
                f"({needed:.3g} GB with data.init_args.shuffle_window={self.shuffle_window}), so that they would be "
                "downloaded again and again: raise the limit, or set a smaller shuffle_window"
            )

    def index(self, split: Split) -> ShardIndex:
        """The index of a split, loaded when it is first asked for."""
        if split not in self.indices:
            index = ShardIndex.load(
                self.patterns[split],
                f"data.init_args.{split}_shards",
                self.num_classes,
                self.faults.max_fault_rate,
                self.staging,
            )
            self.indices[split] = index
            if index.faults:
                rank_zero_warn(f"{len(index.faults)} broken samples of {self.patterns[split]} are left out")
                if self.process[0] == 0:  # all processes find the same
                    self.faults.add(0, index.faults)
        return self.indices[split]

    @property
    def evaluation_transform(self) -> dict[str, Any]:
        """What is done to an image without augmentation, for the record."""
        return {"image_size": list(self.image_size), **CENTER_CROP}

    def dataset(self, split: Split, training: bool) -> ImageShardDataset:
        """Reads images of a split, augmented in training."""
        if not training:
            return ImageShardDataset(self.index(split), self.image_size)
        augmentation = {"horizontal_flip": self.horizontal_flip, "random_crop_scale": self.random_crop_scale}
        return ImageShardDataset(self.index(split), self.image_size, self.seed, training=True, **augmentation)

    def predict_dataloader(self) -> list[DataLoader[ImageBatch]]:
        """Training, then validation images without augmentation, shard by shard, without ``finished_shards``."""
        loaders = []
        for split, finished in self.finished_shards.items():
            shards = [shard for shard in range(len(self.index(split).paths)) if shard not in finished]
            loaders.append(self.shardwise_dataloader(split, shards))
        return loaders

    def on_before_batch_transfer(self, batch: ImageBatch, dataloader_idx: int) -> ImageBatch:
        """Note broken samples as well."""
        faults = batch["faults"]
        self.faults.add(int(batch["valid"].sum()) + len(faults), faults)
        return super().on_before_batch_transfer(batch, dataloader_idx)

    def on_after_batch_transfer(self, batch: ImageBatch, dataloader_idx: int) -> ImageBatch:
        """Make floats of the images, on the device."""
        return to_model_input(batch)

    def report(self) -> None:
        """Add up and report broken samples as well."""
        super().report()
        self.faults.check(self.trainer, sum(len(index) + len(index.faults) for index in self.indices.values()))

    def teardown(self, stage: str) -> None:
        """Report what came since the last report."""
        if self.trainer is not None and self.indices:
            self.report()
