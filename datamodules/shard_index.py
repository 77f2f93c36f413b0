"""All samples of a split as arrays, from ``index.json`` or by walking the shards; checked before any training."""

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from datamodules import remote
from datamodules.faults import check_fault_rate
from datamodules.find_shards import find_records
from datamodules.shards import Fault, ShardError, ShardRecord, keys_of, open_files, open_or_explain
from datamodules.staging import Staging


@dataclass
class ShardIndex:
    """The location of every sample of a split: arrays over samples, numbered shard after shard."""

    paths: list[str]
    """Local paths or URLs of the shards."""
    shard_bytes: list[int]
    shard_samples: list[int]
    shard: np.ndarray
    """(n,) int32, index into ``paths``."""
    offset: np.ndarray
    """(n,) int64, first byte of the image."""
    size: np.ndarray
    """(n,) int32, bytes of the image."""
    label: np.ndarray
    """(n,) int64."""
    faults: list[Fault] = field(default_factory=list)
    """Samples that were left out."""
    staging: Staging | None = None
    class_names: list[str] | None = None

    def __len__(self) -> int:
        return len(self.offset)

    @classmethod
    def load(
        cls,
        pattern: str,
        config_key: str,
        num_classes: int,
        max_fault_rate: float = 0.0,
        staging: Staging | None = None,
    ) -> "ShardIndex":
        """Find the shards of a pattern and index them.

        Args:
            pattern: local glob pattern, or URL with braces or wildcards.
            config_key: named in error messages.
            num_classes: labels must lie in 0 ... num_classes - 1.
            max_fault_rate: share of broken samples above which loading fails; fewer are left out.
            staging: where remote shards are kept.

        Raises:
            ShardError: if a shard is missing, damaged or differs from its index, two shards have the same content, or
                too many samples are broken.
        """
        records, class_names = find_records(pattern, config_key, staging)
        index = cls.build(records, num_classes)
        index.staging, index.class_names = staging, class_names
        check_fault_rate(index.faults, len(index) + len(index.faults), max_fault_rate, f"{config_key}={pattern!r}")
        return index

    @classmethod
    def build(cls, records: list[ShardRecord], num_classes: int) -> "ShardIndex":
        """Concatenate shards. Samples with a label out of range or a repeated key become faults."""
        refuse_equal_shards(records)
        faults = [fault for record in records for fault in record.faults]
        keep = [(record.labels >= 0) & (record.labels < num_classes) for record in records]
        text = f"label %d, but labels must lie in 0 ... {num_classes - 1}: wrong num_classes?"
        for record, usable in zip(records, keep, strict=True):
            wrong = np.flatnonzero(~usable)
            for key, label in zip(key_names(record, wrong), record.labels[wrong], strict=True):
                faults.append(Fault(Path(record.path).name, key, "label_out_of_range", text % label))
        faults += drop_repeated_keys(records, keep)
        samples = [int(usable.sum()) for usable in keep]
        offset, size, label = (
            np.concatenate([getattr(record, name)[usable] for record, usable in zip(records, keep, strict=True)])
            for name in ("offsets", "sizes", "labels")
        )
        return cls(
            [record.path for record in records],
            [record.bytes for record in records],
            samples,
            np.repeat(np.arange(len(records), dtype=np.int32), samples),
            offset,
            size.astype(np.int32),
            label,
            faults,
        )

    def fingerprint(self) -> str:
        """Return a short hash of all offsets, sizes and labels: equal for equal data in any folder."""
        digest = hashlib.sha256()
        for column in (self.shard, self.offset, self.size, self.label):
            digest.update(np.ascontiguousarray(column).tobytes())
        return digest.hexdigest()[:16]

    def read(self, index: int) -> bytes:
        """Return the encoded image of one sample.

        Raises:
            ShardError: if its shard is missing or has become shorter.
        """
        number = self.shard[index]
        path, size = self.paths[number], int(self.size[index])
        files = open_files()
        file = files[path] or files.keep(path, self.open_shard(number))
        data = os.pread(file.fileno(), size, int(self.offset[index]))
        if len(data) != size:
            raise ShardError(f"{path}: sample {index} needs {size} bytes, got {len(data)}; was the shard replaced?")
        return data

    def open_shard(self, number: int) -> BinaryIO:
        """Open a shard; copy it to this machine first if it is remote."""
        path = self.paths[number]
        if not remote.is_remote(path):
            return open_or_explain(path)
        assert self.staging is not None
        open_files().close_deleted()
        return self.staging.open(path, self.shard_bytes[number])

    def keys(self, indices: np.ndarray) -> list[str]:
        """Return the keys of samples of one shard, by walking the shard."""
        if len(indices) == 0:
            return []
        with self.open_shard(self.shard[indices[0]]) as file:
            return keys_of(file, self.offset[indices])

    def fault(self, index: int, reason: str, detail: object) -> Fault:
        """Describe a broken sample."""
        try:
            key = self.keys(np.array([index]))[0]
        except (ShardError, OSError, KeyError):  # the shard itself is broken
            key = f"byte {self.offset[index]}"
        return Fault(Path(self.paths[self.shard[index]]).name, key, reason, str(detail)[:200])


def key_names(record: ShardRecord, places: np.ndarray) -> list[str]:
    """Return the keys of some samples of a shard; for a remote shard, the bytes at which they begin."""
    if len(places) == 0:
        return []
    if remote.is_remote(record.path):
        return [f"byte {offset}" for offset in record.offsets[places]]
    with open_or_explain(record.path) as file:
        return keys_of(file, record.offsets[places])


def drop_repeated_keys(records: Iterable[ShardRecord], keep: list[np.ndarray]) -> list[Fault]:
    """Unmark in ``keep`` the samples whose key occurs in an earlier walked shard; return them as faults."""
    faults: list[Fault] = []
    # Packing makes the keys of one index.json unique.
    walked = [(record, usable) for record, usable in zip(records, keep, strict=True) if record.key_hashes is not None]
    if not walked:
        return faults
    hashes = [record.key_hashes for record, _ in walked]
    repeated = np.ones(sum(map(len, hashes)), dtype=bool)
    repeated[np.unique(np.concatenate(hashes), return_index=True)[1]] = False  # the first of each
    of_shards = np.split(repeated, np.cumsum([len(part) for part in hashes])[:-1])
    for (record, usable), repeated_here in zip(walked, of_shards, strict=True):
        again = repeated_here & usable
        usable[again] = False
        for key in key_names(record, np.flatnonzero(again)):
            detail = "an earlier shard has this key; packing the tar files gives every sample its own"
            faults.append(Fault(Path(record.path).name, key, "duplicate_key", detail))
    return faults


def refuse_equal_shards(records: Iterable[ShardRecord]) -> None:
    """Raise ShardError if two shards have the same content."""
    seen: dict[str, str] = {}
    for record in records:
        if record.sha256 and len(record) and seen.setdefault(record.sha256, record.path) != record.path:
            raise ShardError(f"{record.path} has the same content as {seen[record.sha256]}: remove one of them")
