"""WebDataset shards as a random-access list of samples: an index of byte offsets over ordinary tar files."""

import glob
import hashlib
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
BLOCK = 512


class ShardError(RuntimeError):
    """A shard is missing, damaged, or does not hold what it should."""


def find_shards(pattern: str, config_key: str) -> list[str]:
    """Sorted paths that match a glob pattern.

    Raises:
        ShardError: if nothing matches; ``config_key`` is named in the message.
    """
    paths = sorted(glob.glob(pattern))
    if not paths:
        raise ShardError(
            f"{config_key}={pattern!r} matches no file. Write shards with: "
            "python -m datamodules.pack --source IMAGE_FOLDER --output FOLDER"
        )
    return paths


def samples_of(path: str) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Yield (key, members by extension) of each sample of a tar file.

    Raises:
        ShardError: if the file is no tar, is truncated, or has two members of one name.
    """
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            end = 0
            for member in archive:
                end = member.offset_data + -(-member.size // BLOCK) * BLOCK
                if not member.isfile():
                    continue
                folder, name = os.path.split(member.name)
                key, _, extension = name.partition(".")
                members = samples.setdefault(f"{folder}/{key}" if folder else key, {})
                if extension.lower() in members:
                    raise ShardError(f"{path}: member {member.name!r} occurs twice")
                members[extension.lower()] = member
    except (tarfile.TarError, OSError) as error:
        raise ShardError(f"{path} cannot be read as a tar file ({error}); write or copy it again") from error
    with open(path, "rb") as file:
        file.seek(end)
        if file.read(BLOCK) != bytes(BLOCK):
            raise ShardError(f"{path} is truncated or damaged after byte {end}: no end-of-archive marker there")
    yield from samples.items()


@dataclass
class ShardIndex:
    """Where each sample of a split lies: arrays over samples, and the paths that ``shard`` points into."""

    paths: list[str]
    shard: np.ndarray
    """(n,) int32."""
    offset: np.ndarray
    """(n,) int64, first byte of the image."""
    size: np.ndarray
    """(n,) int64, bytes of the image."""
    label: np.ndarray
    """(n,) int64."""

    def __len__(self) -> int:
        return len(self.offset)

    @classmethod
    def build(cls, paths: list[str], num_classes: int) -> "ShardIndex":
        """Walk all shards once.

        Raises:
            ShardError: for a damaged shard, a sample without image or label, or a label outside 0 ... num_classes - 1.
        """
        rows = []
        for number, path in enumerate(paths):
            with open(path, "rb") as file:
                for key, members in samples_of(path):
                    image = next((members[name] for name in IMAGE_EXTENSIONS if name in members), None)
                    if image is None or image.size == 0:
                        raise ShardError(
                            f"{path}: sample {key!r} has no image ({', '.join(IMAGE_EXTENSIONS)}) or an empty one"
                        )
                    label = read_label(file, path, key, members.get("cls"), num_classes)
                    rows.append((number, image.offset_data, image.size, label))
        columns = np.array(rows, dtype=np.int64).reshape(-1, 4).T
        return cls(paths, columns[0].astype(np.int32), columns[1], columns[2], columns[3])

    def fingerprint(self) -> str:
        """Short hash of all offsets, sizes and labels: equal for equal data, wherever it lies."""
        digest = hashlib.sha256()
        for column in (self.shard, self.offset, self.size, self.label):
            digest.update(np.ascontiguousarray(column).tobytes())
        return digest.hexdigest()[:16]

    def read(self, index: int) -> bytes:
        """The encoded image of one sample; raises ShardError if the shard has become shorter."""
        path = self.paths[self.shard[index]]
        size = int(self.size[index])
        data = os.pread(open_shard(path).fileno(), size, int(self.offset[index]))
        if len(data) != size:
            raise ShardError(f"{path}: sample {index} needs {size} bytes, got {len(data)}; was the shard replaced?")
        return data

    def describe(self, index: int) -> str:
        """Shard and byte of a sample, for messages."""
        return f"sample {index} ({Path(self.paths[self.shard[index]]).name}, byte {self.offset[index]})"


def read_label(file: BinaryIO, path: str, key: str, member: tarfile.TarInfo | None, num_classes: int) -> int:
    """The integer in a ``cls`` member, checked against the number of classes."""
    if member is None:
        raise ShardError(f"{path}: sample {key!r} has no label (cls)")
    text = os.pread(file.fileno(), member.size, member.offset_data)
    try:
        label = int(text)
    except ValueError as error:
        raise ShardError(f"{path}: sample {key!r} has label {text[:20]!r}, expected an integer") from error
    if not 0 <= label < num_classes:
        raise ShardError(
            f"{path}: sample {key!r} has label {label}, outside 0 ... {num_classes - 1}: wrong num_classes?"
        )
    return label


@lru_cache(maxsize=128)
def open_shard(path: str) -> BinaryIO:
    """An open file, kept for the next read; the least recently used one is closed when it is dropped."""
    return open(path, "rb", buffering=0)
