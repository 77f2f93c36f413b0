"""Indices and class labels of the samples to make, for ``python main.py predict`` with ``overlay/samples.yaml``."""

from collections.abc import Collection
from typing import Any, Literal

import numpy as np
from torch.utils.data import DataLoader, Dataset

from datamodules.base import Split, common_entries
from datamodules.order import BatchReference, ShardwiseOrder
from datamodules.sharded import Loading, ShardedData


class SampleBlocks:
    """Samples 0 ... count - 1 in blocks. A process takes, writes and resumes whole blocks, as it does shards.

    Args:
        count: number of samples.
        block: samples per block; the last may hold fewer.
    """

    def __init__(self, count: int, block: int) -> None:
        self.shard_samples = [min(block, count - first) for first in range(0, count, block)]

    def __len__(self) -> int:
        return sum(self.shard_samples)

    def fingerprint(self) -> str:
        """Return the sizes of the blocks."""
        return str(self.shard_samples)


class LabelDataset(Dataset[Any]):
    """The label of each sample, by its index.

    Args:
        labels: (count,) int64.
    """

    def __init__(self, labels: np.ndarray) -> None:
        self.labels = labels

    def __getitems__(self, reference: BatchReference) -> dict[str, Any]:
        """Return one batch of arrays; the loader makes tensors of them."""
        return common_entries(self.labels, reference.indices, reference.position)


class SampleLabels(ShardedData):
    """Labels to sample images for. Each image depends on its index and label only.

    Args:
        count: number of images.
        num_classes: number of classes; null for a denoiser without labels, for which all labels are 0.
        labels: ``balanced`` gives every class equally often (index modulo classes), ``random`` draws each label.
        batch_size: images at a time in each process, so that the number of processes does not change an image.
        block: images per file while sampling; an interrupted run resumes with the next block.
        seed: seed of random labels; ``seed_everything`` if not given.

    Raises:
        ValueError: if there is nothing to sample.
    """

    def __init__(
        self,
        count: int = 50_000,
        num_classes: int | None = 1000,
        labels: Literal["balanced", "random"] = "balanced",
        batch_size: int = 256,
        block: int = 1024,
        seed: int | None = None,
    ) -> None:
        if count < 1 or block < 1:
            raise ValueError(f"data.init_args.count={count} and block={block} must be at least 1")
        super().__init__(batch_size, None, Loading(num_workers=0), None, False, seed)
        self.num_classes, self.samples = num_classes, SampleBlocks(count, block)
        self.finished_shards: dict[Split, Collection[int]] = {"train": ()}
        rng = np.random.Generator(np.random.PCG64([self.seed, 2]))
        random = rng.integers(num_classes or 1, size=count)
        self.labels = random if labels == "random" else np.arange(count) % (num_classes or 1)

    def index(self, split: Split) -> SampleBlocks:
        """Return the blocks of samples."""
        return self.samples

    def dataset(self, split: Split, training: bool) -> LabelDataset:
        """Return labels and indices."""
        return LabelDataset(self.labels)

    def predict_dataloader(self) -> DataLoader[Any]:
        """Load block by block, without ``finished_shards``."""
        samples = self.samples.shard_samples
        ends = np.cumsum(samples).tolist()
        finished = self.finished_shards["train"]
        ranges = [
            (end - count, end)
            for block, (count, end) in enumerate(zip(samples, ends, strict=True))
            if block not in finished
        ]
        rank, world_size = self.process
        order = ShardwiseOrder(ranges, self.batch_size * world_size, rank, world_size)
        return self.loading.loader(self.dataset("train", training=False), order)
