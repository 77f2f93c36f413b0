"""Latents from a cache that ``callbacks.LatentWriter`` wrote, memory-mapped, as a LightningDataModule."""

from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse.typing import PositiveInt
from torch.utils.data import Dataset, get_worker_info

from datamodules.base import LatentBatch, Split, common_entries
from datamodules.order import BatchReference
from datamodules.sharded import Loading, ShardedData
from datamodules.shards import ShardError
from maetok.formats.latent_cache import LatentCache, LatentSplit


class LatentDataset(Dataset[LatentBatch]):
    """Copies a whole batch of latents out of the memory maps.

    Args:
        index: the shards.
        seed: in training, the variant of a sample is a function of (seed, epoch, sample).
        training: draw variants at random; otherwise read the unmirrored one.
    """

    def __init__(self, index: LatentSplit, seed: int, training: bool) -> None:
        self.index, self.seed, self.training = index, seed, training
        self.epoch, self.variant = -1, np.empty(0, dtype=np.uint8)

    def variants(self, epoch: int) -> np.ndarray:
        """Return the (n,) variant of each sample in an epoch."""
        if epoch != self.epoch:
            rng = np.random.Generator(np.random.PCG64([self.seed, epoch, 1]))
            variant = rng.integers(self.index.variants, size=len(self.index), dtype=np.uint8)
            self.epoch, self.variant = epoch, variant
        return self.variant

    def chosen_variants(self, reference: BatchReference) -> np.ndarray:
        """Return the (B,) variant of each sample of a batch."""
        chosen = np.zeros(len(reference.indices), dtype=np.int64)
        if self.training and self.index.variants > 1:
            for epoch in np.unique(reference.epochs):
                here = reference.epochs == epoch
                chosen[here] = self.variants(int(epoch))[reference.indices[here]]
        return chosen

    def __getitems__(self, reference: BatchReference) -> dict[str, Any]:
        """Return one batch in the order of the reference; the loader turns its arrays into tensors."""
        indices = reference.indices
        latents = self.index.empty(len(indices))
        if get_worker_info() is not None:
            latents.share_memory_()  # the loader would copy it there otherwise
        self.index.copy(indices, self.chosen_variants(reference), latents)
        return {"latents": latents, **common_entries(self.index.label, indices, reference.position)}


class LatentShards(ShardedData):
    """Cached latents in a global order that resumes exactly, like images.

    A task with a tokenizer has an attribute ``tokenizer_hash``; a cache of another tokenizer is refused.

    Args:
        cache: folder that ``callbacks.LatentWriter`` wrote.
        num_classes: labels must lie in 0 ... num_classes - 1.
        loading: worker processes, prefetching, pinned memory.
        **kwargs: see :class:`datamodules.sharded.ShardedData`.
    """

    def __init__(
        self,
        cache: str,
        num_classes: PositiveInt = 1000,
        loading: Loading = Loading(num_workers=2),  # noqa: B008 - frozen
        **kwargs: Any,
    ) -> None:
        super().__init__(loading=loading, **kwargs)
        self.cache, self.num_classes = Path(cache), num_classes
        self._opened: LatentCache | None = None

    @property
    def latent_cache(self) -> LatentCache:
        """The cache, opened on first use; raises ShardError if it is incomplete."""
        if self._opened is None:
            try:
                self._opened = LatentCache(self.cache)
            except (OSError, ValueError) as error:
                raise ShardError(f"data.init_args.cache={self.cache}: {error}") from error
        return self._opened

    def setup(self, stage: str) -> None:
        """Open the cache.

        Raises:
            ShardError: if it is incomplete, of another tokenizer than the task's, or has labels out of range.
        """
        expected = getattr(self.trainer and self.trainer.lightning_module, "tokenizer_hash", None)
        found = self.latent_cache.manifest["tokenizer_hash"]
        if expected is not None and expected != found:
            raise ShardError(
                f"data.init_args.cache={self.cache} was encoded by tokenizer {found[:16]}, but the task has tokenizer "
                f"{expected[:16]}: encode the data with the task's tokenizer, or give the task the other one"
            )
        for split in ("train", "validation") if stage == "fit" else ("validation",):
            self.index(split)

    def index(self, split: Split) -> LatentSplit:
        """Return the shards of a split, opened on first use."""
        if split not in self.indices:
            try:
                index = self.latent_cache.split(split)
            except (OSError, ValueError) as error:
                raise ShardError(f"data.init_args.cache={self.cache}: {error}") from error
            low, high = index.label.min(), index.label.max()
            if not 0 <= low <= high < self.num_classes:
                raise ShardError(
                    f"data.init_args.cache={self.cache}: {split} labels range from {low} to {high}, outside 0 ... "
                    f"{self.num_classes - 1}: wrong num_classes?"
                )
            self.indices[split] = index
        return self.indices[split]

    def dataset(self, split: Split, training: bool) -> LatentDataset:
        """Return the dataset that reads latents of a split."""
        return LatentDataset(self.index(split), self.seed, training)

    def on_after_batch_transfer(self, batch: LatentBatch, dataloader_idx: int) -> LatentBatch:
        """Convert the latents to float32, on the device."""
        return {**batch, "latents": batch["latents"].float()}
