"""The latent cache: the only code that knows its file names, its safetensors headers and its manifest (docs/data.md).

A cache is a folder with one safetensors file per image shard and a ``manifest.json`` that is written last.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from maetok.formats.channel_moments import ChannelMoments
from maetok.formats.files import atomic_write, write_text

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
SPLITS = ("train", "validation")


class CacheIdentity(TypedDict):
    """What decides the values in a cache. Every shard and the manifest record it."""

    tokenizer_hash: str
    transform: dict[str, Any]
    """How images are resized and cropped before encoding."""
    variants: list[str]
    """``original``, and ``mirrored`` if the latents of mirrored images are stored too."""
    dtype: str
    """``float16``, ``bfloat16`` or ``float32``."""
    precision: str
    """Of the encoder."""
    sources: dict[str, str]
    """Fingerprint of the images of each split."""


def shard_path(folder: Path, split: str, number: int) -> Path:
    """Return the path of one shard of a cache."""
    return folder / f"{split}-{number:06d}.safetensors"


def write_shard(
    path: Path, latents: Tensor, labels: Tensor, indices: Tensor, keys: list[str], identity: CacheIdentity, source: str
) -> None:
    """Write one shard; it gets its name when it is complete on disk. Equal arguments give equal bytes.

    Args:
        path: see :func:`shard_path`.
        latents: (n, variants, L, C) in the dtype of the cache.
        labels: (n,) int64.
        indices: (n,) int64 index of each sample in its split.
        keys: key of each sample in its image shard.
        identity: what decides the values.
        source: file name of the image shard.
    """
    moments = ChannelMoments.of(latents.float().numpy())
    tensors = {
        "latents": latents.contiguous(),
        "labels": labels,
        "indices": indices,
        "keys": torch.frombuffer(bytearray(json.dumps(keys).encode()), dtype=torch.uint8),
    }
    metadata = {
        "identity": identity,
        "source": source,
        "count": moments.count,
        "mean": moments.mean.tolist(),
        "squared_deviations": moments.squared_deviations.tolist(),
    }
    with atomic_write(path) as partial:
        save_file(tensors, partial, {"cache": json.dumps(metadata)})
        partial.chmod(0o644)  # safetensors makes it readable by its owner only, but caches are shared


def read_metadata(path: Path) -> dict[str, Any]:
    """Return what a shard records besides its tensors: identity, source and moments.

    Raises:
        FileNotFoundError: if there is no such shard.
        ValueError: if the shard is damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            return json.loads((file.metadata() or {}).get("cache", "{}"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is missing: run the same predict command again to encode it") from error
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): remove it and run the same predict command again") from error


def describe_split(paths: Sequence[Path]) -> dict[str, Any]:
    """Return a split's entry in the manifest: its files, and mean and standard deviation per channel.

    The moments of the shards are merged in the given order, so the result does not depend on who wrote them.
    """
    shards, moments = [], []
    for path in paths:
        metadata = read_metadata(path)
        mean, squared_deviations = (np.array(metadata[name]) for name in ("mean", "squared_deviations"))
        moments.append(ChannelMoments(metadata["count"], mean, squared_deviations))
        with safe_open(path, "pt") as file:
            (samples,) = file.get_slice("labels").get_shape()
        shards.append({"file": path.name, "samples": samples, "bytes": path.stat().st_size})
    merged = reduce(ChannelMoments.merge, moments)
    return {
        "samples": sum(shard["samples"] for shard in shards),
        "mean": merged.mean.tolist(),
        "std": merged.std.tolist(),
        "shards": shards,
    }


def write_manifest(
    folder: Path, identity: CacheIdentity, class_names: list[str] | None, splits: Mapping[str, dict[str, Any]]
) -> None:
    """Write ``manifest.json``, which makes the cache complete.

    Args:
        folder: folder of the cache.
        identity: what decides the values.
        class_names: names of the labels, if known.
        splits: entry of each split; see :func:`describe_split`.
    """
    first = next(shard["file"] for split in splits.values() for shard in split["shards"])
    with safe_open(folder / first, "pt") as file:
        _, _, *latent_shape = file.get_slice("latents").get_shape()
    manifest = {
        "schema_version": SCHEMA_VERSION,
        **identity,
        "latent_shape": latent_shape,
        "class_names": class_names,
        "splits": splits,
    }
    write_text(folder / MANIFEST, json.dumps(manifest, indent=1))


def write_cache(folder: Path, splits: Mapping[str, tuple[np.ndarray, np.ndarray]], samples_per_shard: int) -> None:
    """Write arrays as a complete cache without a tokenizer or source images, for benchmarks and tests.

    Args:
        folder: folder of the cache; created if missing.
        splits: latents (n, L, C) float16 and labels (n,) int64 of each split.
        samples_per_shard: the last shard of a split may hold fewer.
    """
    identity: CacheIdentity = {
        "tokenizer_hash": "none",
        "transform": {},
        "variants": ["original"],
        "dtype": "float16",
        "precision": "none",
        "sources": dict.fromkeys(splits, "none"),
    }
    entries = {}
    for split, (latents, labels) in splits.items():
        paths = []
        for number, first in enumerate(range(0, len(latents), samples_per_shard)):
            indices = np.arange(first, min(first + samples_per_shard, len(latents)))
            part, of_part, numbers = map(torch.from_numpy, (latents[indices, None], labels[indices], indices))
            paths.append(shard_path(folder, split, number))
            write_shard(paths[-1], part, of_part, numbers, list(map(str, indices)), identity, "none")
        entries[split] = describe_split(paths)
    write_manifest(folder, identity, None, entries)


def raw_array(tensor: Tensor) -> np.ndarray:
    """View a tensor as a numpy array of integers of the same size: numpy has no bfloat16."""
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()]).numpy()


class LatentCache:
    """A complete cache.

    Args:
        folder: folder with ``manifest.json``.

    Raises:
        FileNotFoundError: if there is no manifest, because encoding has not finished.
        ValueError: if the manifest has another version.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder} has no {MANIFEST}: encode the data first, or again if encoding was interrupted "
                "(python main.py predict --config configs/experiment/..._latents.yaml)"
            )
        self.folder, self.manifest = folder, json.loads(path.read_text())
        if self.manifest.get("schema_version") != SCHEMA_VERSION:
            raise ValueError(f"{path} is not a manifest of version {SCHEMA_VERSION}: encode the data again")
        self.splits: dict[str, LatentSplit] = {}

    def has(self, split: str) -> bool:
        """Return whether the cache holds samples of a split."""
        return bool(self.manifest["splits"].get(split, {}).get("samples"))

    def split(self, split: str) -> "LatentSplit":
        """Return the shards of a split, opened on first use; raise ValueError if it has no samples."""
        if not self.has(split):
            raise ValueError(f"{self.folder} has no samples of the split {split!r}")
        if split not in self.splits:
            self.splits[split] = LatentSplit(self.folder, self.manifest, split)
        return self.splits[split]

    def labels(self, split: str) -> np.ndarray:
        """Return the (n,) int64 labels of a split in stored order."""
        return self.split(split).label

    def latents(self, split: str, positions: np.ndarray) -> np.ndarray:
        """Return (k, L, C) float32 unmirrored latents at positions of a split; nothing else is read."""
        opened = self.split(split)
        latents = opened.empty(len(positions))
        opened.copy(positions, np.zeros_like(positions), latents)
        return latents.float().numpy()


class LatentSplit:
    """The shards of one split, checked against the manifest and mapped into memory.

    Args:
        folder: folder of the cache.
        manifest: contents of its manifest.
        split: name of the split.

    Raises:
        ValueError: if a file is missing, damaged or not the one that the manifest lists.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any], split: str) -> None:
        contents = manifest["splits"][split]
        self.dtype: torch.dtype = getattr(torch, manifest["dtype"])
        self.variants = len(manifest["variants"])
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
        """Return a short hash of tokenizer, source data and labels."""
        return hashlib.sha256(self.identity.encode() + self.label.tobytes()).hexdigest()[:16]

    def checked_labels(self, path: Path, shard: Mapping[str, Any]) -> np.ndarray:
        """Return the labels (n,) of a shard after comparing its shape and size with the manifest."""
        expected = [shard["samples"], self.variants, *self.latent_shape]
        try:
            with safe_open(path, "pt") as file:
                shape = file.get_slice("latents").get_shape()
                if path.stat().st_size != shard["bytes"] or shape != expected:
                    raise ValueError(
                        f"{path} has shape {shape}, but {MANIFEST} says {expected} in {shard['bytes']} bytes: remove "
                        "it and encode again"
                    )
                return file.get_tensor("labels").numpy()
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} cannot be read ({error}): remove it and encode again") from error

    def mapped(self, shard: int) -> np.ndarray:
        """Return a shard's latents (n, variants, L, C), mapped into memory, as :func:`raw_array`."""
        if shard not in self.opened:
            with safe_open(self.paths[shard], "pt") as file:
                self.opened[shard] = raw_array(file.get_tensor("latents"))  # maps the file; nothing is read yet
        return self.opened[shard]

    def empty(self, count: int) -> Tensor:
        """Return zeros (count, L, C) in the dtype of the cache, to be filled by :meth:`copy`."""
        return torch.zeros(count, *self.latent_shape, dtype=self.dtype)

    def copy(self, indices: np.ndarray, variants: np.ndarray, latents: Tensor) -> None:
        """Copy latents of samples into a tensor; rows with a negative index stay as they are.

        Args:
            indices: (B,) int64 index of each sample in the split.
            variants: (B,) int64 variant of each sample.
            latents: (B, L, C) as :meth:`empty` returns.
        """
        raw = raw_array(latents)
        shards = np.searchsorted(self.ends, indices, side="right")
        rows = indices - np.concatenate(([0], self.ends))[shards]
        places = zip(shards.tolist(), rows.tolist(), variants.tolist(), strict=True)
        for place, (shard, row, variant) in enumerate(places):
            if indices[place] >= 0:
                raw[place] = self.mapped(shard)[row, variant]
