"""``index.json``: the samples of a folder of shards, so that a run need not walk the shards.

::

    {"schema_version": 1,
     "class_names": [...] or null,
     "totals": {"shards": s, "samples": n, "bytes": b},
     "packings": {split: {"fingerprint": of source and options, "faults": {reason: count}}},
     "shards": [{"file", "samples", "bytes", "sha256", "offsets": [...], "sizes": [...], "labels": [...]}, ...]}

``offsets`` and ``sizes`` are the bytes of each image in its tar file; keys and labels are in the tar file as well.
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.shards import ShardError, ShardRecord
from maetok.formats.files import write_text

SCHEMA_VERSION = 1
NAME = "index.json"
COLUMNS = ("offsets", "sizes", "labels")


@dataclass
class IndexFile:
    """The contents of ``index.json``. Records are keyed by file name, and their ``path`` is that name."""

    class_names: list[str] | None = None
    packings: dict[str, dict[str, Any]] = field(default_factory=dict)
    records: dict[str, ShardRecord] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str | bytes, source: str) -> "IndexFile":
        """Read the contents of the file ``source``.

        Raises:
            ShardError: if this is not an index, or the index has another version.
        """
        try:
            contents = json.loads(text, object_hook=columns_to_arrays)  # shard by shard, which keeps memory low
            if contents["schema_version"] != SCHEMA_VERSION:
                raise ShardError(
                    f"{source} has schema version {contents['schema_version']}, this suite reads {SCHEMA_VERSION}: "
                    "pack again, or use the version of the suite that packed it"
                )
            records = {shard["file"]: record_of(shard) for shard in contents["shards"]}
            return cls(contents["class_names"], contents["packings"], records)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ShardError(
                f"{source} is not an index of shards ({type(error).__name__}: {error}): pack again, or remove it to "
                "have the shards walked"
            ) from error

    @classmethod
    def read(cls, folder: str | Path) -> "IndexFile | None":
        """Return the index of a folder, or None if it has none."""
        path = Path(folder) / NAME
        return cls.parse(path.read_bytes(), str(path)) if path.is_file() else None

    def write(self, folder: Path) -> None:
        """Write ``index.json`` atomically, one line per shard. Equal contents give equal bytes."""
        records = [self.records[name] for name in sorted(self.records)]
        totals = {
            "shards": len(records),
            "samples": sum(len(record) for record in records),
            "bytes": sum(record.bytes for record in records),
        }
        head = {
            "schema_version": SCHEMA_VERSION,
            "class_names": self.class_names,
            "totals": totals,
            "packings": dict(sorted(self.packings.items())),
        }
        shards = ",\n".join(json.dumps(entry_of(record)) for record in records)
        write_text(folder / NAME, f'{json.dumps(head)[:-1]},\n"shards": [\n{shards}\n]}}\n')


def entry_of(record: ShardRecord) -> dict[str, Any]:
    """Return the JSON object of one shard."""
    return {
        "file": Path(record.path).name,
        "samples": len(record),
        "bytes": record.bytes,
        "sha256": record.sha256,
        **{name: getattr(record, name).tolist() for name in COLUMNS},
    }


def record_of(entry: dict[str, Any]) -> ShardRecord:
    """Invert :func:`entry_of`; raise ValueError if the columns differ in length."""
    columns = [entry[name] for name in COLUMNS]
    if {column.shape for column in columns} != {(entry["samples"],)}:
        raise ValueError(f"{entry['file']}: offsets, sizes and labels must have {entry['samples']} entries each")
    return ShardRecord(entry["file"], entry["bytes"], *columns, sha256=entry["sha256"])


def columns_to_arrays(contents: dict[str, Any]) -> dict[str, Any]:
    """Convert the columns of a shard to int64 arrays."""
    return {key: np.array(value, np.int64) if key in COLUMNS else value for key, value in contents.items()}


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a folder; wait while another process or one of its children holds it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
