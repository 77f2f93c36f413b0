"""One WebDataset shard: an ordinary tar file that is walked once to find the byte offsets of its samples."""

import hashlib
import os
import re
import resource
import tarfile
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
BLOCK = 512
HEADERS_CHECKED = 5  # per shard, when its index is read


class ShardError(RuntimeError):
    """A shard is missing, damaged or not the expected one."""


class Fault(NamedTuple):
    """One broken sample."""

    shard: str
    """File name of the shard; when packing, of the source file."""
    key: str
    reason: str
    """One of :data:`REASONS`."""
    detail: str


REASONS = (
    "corrupt_image",
    "empty_image",
    "missing_image",
    "missing_label",
    "label_not_integer",
    "label_out_of_range",
    "duplicate_key",
    "unreadable",
)


class TarSample(NamedTuple):
    """The members of a tar file that share a key."""

    key: str
    members: dict[str, tarfile.TarInfo]
    """By extension in lower case."""
    is_duplicate: bool
    """Whether two members have the same name, so that it is unknown which one is meant."""


def samples_of(file: BinaryIO) -> list[TarSample]:
    """Return the samples of an open tar file in the order of their first members.

    Raises:
        ShardError: if the file is not a tar file, damaged or truncated.
    """
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    duplicates = set()
    try:
        file.seek(0)
        with tarfile.open(fileobj=file, mode="r:") as archive:
            end = 0
            for member in archive:
                end = member.offset_data + -(-member.size // BLOCK) * BLOCK
                folder, name = os.path.split(member.name)
                if not member.isfile() or name.startswith("."):
                    continue
                key, _, extension = name.partition(".")
                key = f"{folder}/{key}" if folder else key
                members = samples.setdefault(key, {})
                if extension.lower() in members:
                    duplicates.add(key)
                members[extension.lower()] = member
    except (tarfile.TarError, OSError) as error:
        raise ShardError(f"{file.name} cannot be read as a tar file ({error}); write or copy it again") from error
    if os.pread(file.fileno(), BLOCK, end) != bytes(BLOCK):
        raise ShardError(f"{file.name} is truncated or damaged after byte {end}: no end-of-archive marker there")
    return [TarSample(key, members, key in duplicates) for key, members in samples.items()]


@dataclass
class ShardRecord:
    """The locations of the images of one shard, and their labels."""

    path: str
    """Local path or URL."""
    bytes: int
    offsets: np.ndarray
    """(n,) int64, first byte of each image."""
    sizes: np.ndarray
    """(n,) int64, bytes of each image."""
    labels: np.ndarray
    """(n,) int64, as stored."""
    sha256: str | None = None
    faults: list[Fault] = field(default_factory=list)
    """Samples that were left out."""
    key_hashes: np.ndarray | None = None
    """(n,) int64, comparable within this process; None unless the shard was walked."""

    def __len__(self) -> int:
        return len(self.offsets)

    @classmethod
    def walk(cls, file: BinaryIO, path: str) -> "ShardRecord":
        """Read all headers and labels of an open shard with this path or URL. Broken samples become faults.

        Raises:
            ShardError: if the file as a whole is damaged.
        """
        rows, hashes, faults = [], [], []
        for sample in samples_of(file):
            found = usable_row(file, Path(path).name, sample)
            if isinstance(found, Fault):
                faults.append(found)
            else:
                rows.append(found)
                hashes.append(hash(sample.key))
        columns = np.array(rows, dtype=np.int64).reshape(-1, 3).T
        size = os.fstat(file.fileno()).st_size
        return cls(path, size, *columns, faults=faults, key_hashes=np.array(hashes, dtype=np.int64))

    def check(self, path: str) -> None:
        """Compare the size and some headers of a local file with this record, without reading the whole file.

        Raises:
            ShardError: if the record describes another file.
        """
        remedy = "pack it again, or remove index.json to have the shards walked"
        size = os.path.getsize(path)
        if size != self.bytes:
            raise ShardError(f"{path} has {size} bytes, but its index says {self.bytes}: {remedy}")
        with open(path, "rb") as file:
            for number in np.linspace(0, len(self) - 1, min(HEADERS_CHECKED, len(self))).astype(int):
                header = os.pread(file.fileno(), BLOCK, int(self.offsets[number]) - BLOCK)
                try:
                    matches = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").size == self.sizes[number]
                except tarfile.TarError:
                    matches = False
                if not matches:
                    raise ShardError(
                        f"{path} does not hold what its index says at byte {self.offsets[number]}: {remedy}"
                    )


def open_or_explain(path: str) -> BinaryIO:
    """Open a file without a buffer; raise ShardError if that fails."""
    try:
        return open(path, "rb", buffering=0)
    except OSError as error:
        raise ShardError(f"{path} cannot be opened ({error.strerror}); write or copy it again") from error


def usable_row(file: BinaryIO, name: str, sample: TarSample) -> tuple[int, int, int] | Fault:
    """Return (offset, size, label) of a sample of the shard ``name``, or why it cannot be used."""
    image = next((sample.members[name] for name in IMAGE_EXTENSIONS if name in sample.members), None)
    label = sample.members.get("cls")
    fault = partial(Fault, name, sample.key)
    if sample.is_duplicate:
        return fault("duplicate_key", "two members have the same name")
    if image is None:
        return fault("missing_image", f"members are {', '.join(sample.members)}")
    if image.size == 0:
        return fault("empty_image", image.name)
    if label is None:
        return fault("missing_label", "no member cls")
    text = os.pread(file.fileno(), label.size, label.offset_data)
    number = int(text) if re.fullmatch(rb"\s*-?\d{1,9}\s*", text) else None
    return fault("label_not_integer", repr(text[:20])) if number is None else (image.offset_data, image.size, number)


def keys_of(file: BinaryIO, offsets: np.ndarray) -> list[str]:
    """Return the keys of the samples whose images begin at these bytes of an open shard; walk it once."""
    by_offset = {member.offset_data: sample.key for sample in samples_of(file) for member in sample.members.values()}
    return [by_offset[int(offset)] for offset in offsets]


def file_sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class OpenFiles:
    """Open shards of this process; when there are too many, the least recently used one is closed.

    Args:
        limit: number of files that stay open.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.files = limit, dict[str, BinaryIO]()

    def __getitem__(self, path: str) -> BinaryIO | None:
        """Return the open file and mark it as the most recently used; None if it is not open."""
        file = self.files.pop(path, None)
        if file is not None:
            self.files[path] = file
        return file

    def keep(self, path: str, file: BinaryIO) -> BinaryIO:
        """Keep a file open for the next reads."""
        while len(self.files) >= self.limit:
            self.files.pop(next(iter(self.files))).close()
        self.files[path] = file
        return file

    def close_deleted(self) -> None:
        """Close the files that a cache has deleted to make room: they take space until they are closed."""
        for path in [path for path, file in self.files.items() if os.fstat(file.fileno()).st_nlink == 0]:
            self.files.pop(path).close()


@lru_cache(maxsize=1)
def open_files() -> OpenFiles:
    """Return the open shards of this process, at most half of the files that the system lets it open."""
    return OpenFiles(max(1, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2))
