"""Labelled images from any source, decoded, cropped and batched: the base of the image datamodules.

To read images of another kind, subclass :class:`ImageData` and return an :class:`ImageIndex` from ``load_index``.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from jsonargparse.typing import ClosedUnitInterval, PositiveInt
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from datamodules.augmentation import uniform_numbers
from datamodules.base import ImageBatch, Split, common_entries, to_model_input
from datamodules.faults import FaultMonitor
from datamodules.order import BatchReference
from datamodules.sharded import SampleIndex, ShardedData
from datamodules.shards import Fault, ShardError
from maetok.formats import pictures
from maetok.formats.crops import CENTER_CROP, center_crop, random_crop

REPLACEMENTS = 20  # samples tried in place of a broken one


class ImageIndex(SampleIndex, Protocol):
    """The images of a split. Its samples are numbered 0 ... n - 1."""

    label: np.ndarray
    """(n,) int64."""
    faults: Sequence[Fault]
    """Samples that were left out."""

    def read(self, index: int) -> bytes:
        """Return the encoded image of a sample; raise OSError or ShardError if it cannot be read."""

    def fault(self, index: int, reason: str, detail: object) -> Fault:
        """Describe a broken sample by one of :data:`datamodules.shards.REASONS`."""


class ImageDataset(Dataset[ImageBatch]):
    """Reads a whole batch of images at once. Augmentation depends on (seed, epoch, sample) and nothing else.

    Args:
        index: the images.
        image_size: (height, width) of the images.
        seed: seed of the augmentation.
        training: replace a broken sample with another one, drawn by (seed, epoch, sample); otherwise mark it as not
            valid.
        horizontal_flip: mirror half of the images.
        random_crop_scale: share of the short side that a random crop covers; ``None`` for the centre crop.
    """

    def __init__(
        self,
        index: ImageIndex,
        image_size: tuple[int, int],
        seed: int = 0,
        training: bool = False,
        horizontal_flip: bool = False,
        random_crop_scale: tuple[float, float] | None = None,
    ) -> None:
        self.index, self.image_size, self.seed, self.training = index, image_size, seed, training
        self.horizontal_flip, self.random_crop_scale = horizontal_flip, random_crop_scale

    def image(self, index: int, uniform: Sequence[float]) -> Tensor | Fault:
        """Return (3, H, W) uint8 of one sample, augmented by four uniform numbers, or why it cannot be used."""
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
        """Return index and image of a sample or of its replacement, or (-1, None); append the faults met.

        Raises:
            ShardError: if every candidate for the replacement of a training sample is broken too.
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
        """Return one batch in the order of the reference; the loader turns its arrays into tensors."""
        # Channels last, as decoders return them: reordering them here would take a quarter of the time of decoding.
        pixels = torch.empty(len(reference.indices), *self.image_size, 3, dtype=torch.uint8)
        if get_worker_info() is not None:
            pixels.share_memory_()  # the loader would copy it there otherwise
        images = pixels.permute(0, 3, 1, 2)
        indices = np.full_like(reference.indices, -1)
        faults: list[Fault] = []
        uniform = uniform_numbers(self.seed, reference.epochs, reference.indices, 4).tolist()
        for place, index in enumerate(reference.indices.tolist()):
            indices[place], image = self.sample(index, uniform[place], faults)
            images[place] = 0 if image is None else image
        entries = common_entries(self.index.label, indices, reference.position)
        return {"images": images, **entries, "faults": faults}


class ImageData(ShardedData):
    """Base of the datamodules that read encoded images with labels.

    Broken samples are left out, counted by reason, logged and listed in ``data_faults.jsonl``. In training another
    sample replaces an image that cannot be decoded.

    Args:
        image_size: side or (height, width) of the images in a batch.
        num_classes: labels must lie in 0 ... num_classes - 1.
        horizontal_flip: mirror half of the training images.
        random_crop_scale: share of the short side that a random training crop covers, e.g. [0.8, 1.0]; null for the
            centre crop, which evaluation always uses.
        max_fault_rate: share of broken samples above which the run stops.
        **kwargs: see :class:`datamodules.sharded.ShardedData`.

    Raises:
        ValueError: unless 0 < low <= high <= 1 for ``random_crop_scale``.
    """

    def __init__(
        self,
        image_size: PositiveInt | tuple[PositiveInt, PositiveInt] = 256,
        num_classes: PositiveInt = 1000,
        horizontal_flip: bool = True,
        random_crop_scale: tuple[float, float] | None = None,
        max_fault_rate: ClosedUnitInterval = 0.001,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if random_crop_scale is not None and not 0 < random_crop_scale[0] <= random_crop_scale[1] <= 1:
            raise ValueError(f"data.init_args.random_crop_scale={random_crop_scale} needs 0 < low <= high <= 1")
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.num_classes = num_classes
        self.horizontal_flip, self.random_crop_scale = horizontal_flip, random_crop_scale
        self.faults = FaultMonitor(max_fault_rate)

    def load_index(self, split: Split) -> ImageIndex:
        """Return the images of a split; called once for each split."""
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        """Index the splits that the subcommand reads, so that damaged data is an error before any training."""
        for split in self.splits(stage):
            self.index(split)

    def splits(self, stage: str) -> tuple[Split, ...]:
        """Return the splits that a subcommand reads."""
        return ("train", "validation") if stage in ("fit", "predict") else ("validation",)

    def index(self, split: Split) -> Any:
        """Return the images of a split, indexed on first use."""
        if split not in self.indices:
            index = self.load_index(split)
            if index.faults:
                rank_zero_warn(f"{len(index.faults)} broken samples of the {split} split are left out")
                if self.process[0] == 0:  # all processes find the same
                    self.faults.add(0, index.faults)
            self.indices[split] = index
        return self.indices[split]

    @property
    def evaluation_transform(self) -> dict[str, Any]:
        """How images are transformed without augmentation, for the records of caches."""
        return {"image_size": list(self.image_size), **CENTER_CROP}

    def dataset(self, split: Split, training: bool) -> ImageDataset:
        """Return the dataset of a split, augmented in training."""
        if not training:
            return ImageDataset(self.index(split), self.image_size)
        augmentation = {"horizontal_flip": self.horizontal_flip, "random_crop_scale": self.random_crop_scale}
        return ImageDataset(self.index(split), self.image_size, self.seed, training=True, **augmentation)

    def on_before_batch_transfer(self, batch: ImageBatch, dataloader_idx: int) -> ImageBatch:
        """Count broken samples too."""
        faults = batch["faults"]
        self.faults.add(int(batch["valid"].sum()) + len(faults), faults)
        return super().on_before_batch_transfer(batch, dataloader_idx)

    def on_after_batch_transfer(self, batch: ImageBatch, dataloader_idx: int) -> ImageBatch:
        """Convert the images to floats, on the device."""
        return to_model_input(batch)

    def report(self) -> None:
        """Sum and report broken samples too."""
        super().report()
        self.faults.check(self.trainer, sum(len(index) + len(index.faults) for index in self.indices.values()))

    def teardown(self, stage: str) -> None:
        """Report the samples since the last report."""
        if self.trainer is not None and self.indices:
            self.report()
