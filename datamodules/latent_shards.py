"""Latents from a cache that ``callbacks.LatentWriter`` wrote, memory-mapped, as a LightningDataModule."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch.utils.data import Dataset, get_worker_info

from datamodules.base import LatentBatch, Split
from datamodules.order import BatchReference
from datamodules.sharded import Loading, ShardedData
from datamodules.shards import ShardError

SCHEMA_VERSION = 1
RAW_TYPES = {"float16": np.int16, "bfloat16": np.int16, "float32": np.int32}


class LatentIndex:
    """The shards of one split of a cache.

    Args:
        folder: of the cache.
        manifest: contents of its ``manifest.json``.
        split: which split.

    Raises:
        ShardError: if a file is missing, damaged or not the one the manifest lists.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], split: Split) -> None:
        contents = manifest["splits"][split]
        self.dtype, self.variants = manifest["dtype"], len(manifest["variants"])
        self.latent_shape = tuple(manifest["latent_shape"])
        self.paths = [folder / shard["file"] for shard in contents["shards"]]
        self.shard_samples: Sequence[int] = [shard["samples"] for shard in contents["shards"]]
        self.ends = np.cumsum(self.shard_samples)
        self.mean, self.std = (np.array(contents[name], dtype=np.float64) for name in ("mean", "std"))
        self.identity = json.dumps([manifest[name] for name in ("tokenizer_hash", "sources", "variants", "dtype")])
        labels = [self.checked_labels(path, shard) for path, shard in zip(self.paths, contents["shards"], strict=True)]
        self.label = np.concatenate(labels)
        self.opened: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.label)

    def fingerprint(self) -> str:
        """Short hash of tokenizer, source data and labels."""
        return hashlib.sha256(self.identity.encode() + self.label.tobytes()).hexdigest()[:16]

    def checked_labels(self, path: Path, shard: dict[str, Any]) -> np.ndarray:
        """Labels (n,) of a shard that is what the manifest says."""
        expected = [shard["samples"], self.variants, *self.latent_shape]
        try:
            with safe_open(path, "pt") as file:
                shape = file.get_slice("latents").get_shape()
                if path.stat().st_size != shard["bytes"] or shape != expected:
                    raise ShardError(
                        f"{path}: shape {shape}, but manifest.json says {expected} in {shard['bytes']} bytes"
                    )
                return file.get_tensor("labels").numpy()
        except (OSError, SafetensorError) as error:
            raise ShardError(f"{path} cannot be read ({error}): remove it and encode again") from error

    def latents(self, shard: int) -> np.ndarray:
        """Memory map (n, V, L, C) of a shard, as integers of the same size: numpy has no bfloat16."""
        if shard not in self.opened:
            with safe_open(self.paths[shard], "pt") as file:
                latents = file.get_tensor("latents")  # maps the file; nothing is read yet
            raw = {np.int16: torch.int16, np.int32: torch.int32}[RAW_TYPES[self.dtype]]
            self.opened[shard] = latents.view(raw).numpy()
        return self.opened[shard]


class LatentDataset(Dataset[LatentBatch]):
    """Copies a whole batch of latents out of the memory maps.

    Args:
        index: the shards.
        seed: in training, the variant of a sample is a function of (seed, epoch, sample).
        training: draw variants at random; otherwise the unmirrored one is read.
    """

    def __init__(self, index: LatentIndex, seed: int, training: bool) -> None:
        self.index, self.seed, self.training = index, seed, training
        self.epoch, self.variant = -1, np.empty(0, dtype=np.uint8)

    def variants(self, epoch: int) -> np.ndarray:
        """(n,) variant of each sample in an epoch."""
        if epoch != self.epoch:
            rng = np.random.Generator(np.random.PCG64([self.seed, epoch, 1]))
            self.epoch, self.variant = (
                epoch,
                rng.integers(self.index.variants, size=len(self.index), dtype=np.uint8),
            )
        return self.variant

    def chosen_variants(self, reference: BatchReference) -> np.ndarray:
        """(B,) variant of each sample of a batch."""
        chosen = np.zeros(len(reference.indices), dtype=np.int64)
        if self.training and self.index.variants > 1:
            for epoch in np.unique(reference.epochs):
                here = reference.epochs == epoch
                chosen[here] = self.variants(int(epoch))[reference.indices[here]]
        return chosen

    def __getitems__(self, reference: BatchReference) -> dict[str, Any]:
        """One batch, in the order of the reference; the loader makes tensors of its arrays."""
        index, indices = self.index, reference.indices
        valid = indices >= 0
        latents = torch.zeros(len(indices), *index.latent_shape, dtype=getattr(torch, index.dtype))
        if get_worker_info() is not None:
            latents.share_memory_()  # where it has to go anyway, so that it is not copied there
        raw = latents.view(torch.int16 if latents.element_size() == 2 else torch.int32).numpy()
        shards = np.searchsorted(index.ends, indices, side="right")
        rows = indices - np.concatenate(([0], index.ends))[shards]
        places = zip(shards.tolist(), rows.tolist(), self.chosen_variants(reference).tolist(), strict=True)
        for place, (shard, row, variant) in enumerate(places):
            if indices[place] >= 0:
                raw[place] = index.latents(shard)[row, variant]
        return {
            "latents": latents,
            "labels": np.where(valid, index.label[indices], 0),
            "indices": indices,
            "valid": valid,
            "position": reference.position,
        }


class LatentShards(ShardedData):
    """Cached latents in a global order that resumes exactly, like images.

    A task that is given a tokenizer tells it by an attribute ``tokenizer_hash``; a cache of another one is refused.

    Args:
        cache: folder that ``callbacks.LatentWriter`` wrote.
        num_classes: labels must lie in 0 ... num_classes - 1.
        batch_size: samples per micro-batch over all processes.
        evaluation_batch_size: the same for evaluation; ``batch_size`` if not given.
        loading: worker processes, prefetching, pinned memory.
        shuffle_window: shards that are shuffled together; null for all.
        drop_tail: leave out what does not fill the last batch of an epoch; otherwise that batch goes on into the next.
        seed: seed of order and variants; ``seed_everything`` if not given.
    """

    def __init__(
        self,
        cache: str,
        num_classes: int = 1000,
        batch_size: int = 256,
        evaluation_batch_size: int | None = None,
        loading: Loading = Loading(num_workers=2),  # noqa: B008 - frozen
        shuffle_window: int | None = None,
        drop_tail: bool = False,
        seed: int | None = None,
    ) -> None:
        super().__init__(batch_size, evaluation_batch_size, loading, shuffle_window, drop_tail, seed)
        self.cache, self.num_classes = Path(cache), num_classes
        self.indices: dict[Split, LatentIndex] = {}
        self._manifest: dict[str, Any] | None = None

    @property
    def manifest(self) -> dict[str, Any]:
        """Contents of ``manifest.json``.

        Raises:
            ShardError: if it is missing, which means that encoding has not finished, or is none.
        """
        if self._manifest is None:
            path = self.cache / "manifest.json"
            if not path.is_file():
                raise ShardError(
                    f"data.init_args.cache={self.cache} has no manifest.json: encode the data first, or again if that "
                    "was interrupted (python main.py predict --config configs/experiment/..._latents.yaml)"
                )
            manifest = json.loads(path.read_text())
            if manifest.get("schema_version") != SCHEMA_VERSION:
                raise ShardError(f"{path} is no manifest of version {SCHEMA_VERSION}: encode the data again")
            self._manifest = manifest
        return self._manifest

    def setup(self, stage: str) -> None:
        """Open the cache.

        Raises:
            ShardError: if it is incomplete, of another tokenizer than the task's, or has labels out of range.
        """
        expected = getattr(self.trainer and self.trainer.lightning_module, "tokenizer_hash", None)
        if expected is not None and expected != self.manifest["tokenizer_hash"]:
            raise ShardError(
                f"data.init_args.cache={self.cache} was encoded by tokenizer {self.manifest['tokenizer_hash'][:16]}, "
                f"but the task has tokenizer {expected[:16]}: encode the data with it, or give the task the other one"
            )
        for split in ("train", "validation") if stage == "fit" else ("validation",):
            self.index(split)

    def index(self, split: Split) -> LatentIndex:
        """The shards of a split, opened when first asked for."""
        if split not in self.indices:
            index = LatentIndex(self.cache, self.manifest, split)
            low, high = index.label.min(), index.label.max()
            if not 0 <= low <= high < self.num_classes:
                raise ShardError(
                    f"data.init_args.cache={self.cache}: {split} labels go from {low} to {high}, outside 0 ... "
                    f"{self.num_classes - 1}: wrong num_classes?"
                )
            self.indices[split] = index
        return self.indices[split]

    def dataset(self, split: Split, training: bool) -> LatentDataset:
        """Reads latents of a split."""
        return LatentDataset(self.index(split), self.seed, training)

    def on_after_batch_transfer(self, batch: LatentBatch, dataloader_idx: int) -> LatentBatch:
        """Make float32 of the latents, on the device."""
        return {**batch, "latents": batch["latents"].float()}
