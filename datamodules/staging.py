"""Copies of remote shards on node-local disk, within a size limit.

The processes of a node share the copies and coordinate through files and their locks. fsspec's ``filecache`` and
``simplecache`` are not enough: every process downloads a copy of its own, nothing limits their total size, and a copy
that was cut short is not noticed (tests/datamodules/test_staging.py holds all three).
"""

import fcntl
import hashlib
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from jsonargparse.typing import PositiveFloat

from datamodules.remote import download, is_remote
from datamodules.shards import ShardError
from maetok.formats.files import publish

COPY_NAME = re.compile(r"[0-9a-f]{16}-.*")
PARTIAL_NAME = re.compile(r"\.([0-9a-f]{16}-.*)\.(\d+)\.partial")


@dataclass(frozen=True)
class Staging:
    """Where the copies of remote shards are kept, shared by all processes of a node.

    Args:
        directory: folder on node-local disk; created if missing. Other files in it are left alone.
        limit_gigabytes: size of all copies together, in 1e9 bytes; the least recently used ones are deleted to stay
            below it. None disables the limit. A deleted copy takes space for as long as a process has it open.
    """

    directory: str
    limit_gigabytes: PositiveFloat | None = None

    def __post_init__(self) -> None:
        if not self.directory or is_remote(self.directory):
            raise ValueError(f"data.init_args.staging.directory={self.directory!r} must be a folder on a local disk")

    def open(self, url: str, size: int) -> BinaryIO:
        """Open the copy; it stays readable even if another process then deletes it to make room."""
        while True:
            try:
                return open(self.path(url, size), "rb", buffering=0)
            except FileNotFoundError:  # deleted after path() returned
                time.sleep(0.01)

    def path(self, url: str, size: int) -> str:
        """Return the path of the copy of a shard of ``size`` bytes; download it if it is missing.

        Raises:
            ShardError: if the download fails repeatedly or the disk has no room for it.
        """
        if self.limit_gigabytes is not None and size > self.limit_gigabytes * 1e9:
            raise ShardError(
                f"data.init_args.staging.limit_gigabytes={self.limit_gigabytes} is less than {url} alone "
                f"({size / 1e9:.3g}); raise it, or write smaller shards"
            )
        local = self._folder / local_name(url)
        try:
            if not _touch(local, size):
                self._folder.mkdir(parents=True, exist_ok=True)
                with _locked(self._folder / f".{local.name}.lock"):
                    if not _touch(local, size):  # another process may have downloaded it in the meantime
                        local.unlink(missing_ok=True)
                        self._download(url, size, local)
        except OSError as error:
            raise ShardError(
                f"data.init_args.staging.directory={self.directory!r} cannot hold {url} ({error}); free some space, "
                "set limit_gigabytes, or give another folder"
            ) from error
        return str(local)

    @property
    def _folder(self) -> Path:
        return Path(self.directory).expanduser()

    def _download(self, url: str, size: int, local: Path) -> None:
        """Download under a temporary name, check the size and rename. The caller holds the lock of the shard."""
        partial = self._reserve(local.name, size)
        try:
            download(url, str(partial), size)
            with _locked(self._folder / ".lock"):
                publish(partial, local)
        finally:
            partial.unlink(missing_ok=True)

    def _reserve(self, name: str, size: int) -> Path:
        """Create a temporary file whose name states the room it will take; wait for other downloads if necessary."""
        partial = self._folder / f".{name}.{size}.partial"
        while True:
            with _locked(self._folder / ".lock"):
                if self._make_room(name, size):
                    partial.touch()
                    return partial
            time.sleep(0.05)

    def _make_room(self, name: str, size: int) -> bool:
        """Delete the leftovers of dead processes, then the oldest copies as needed; return whether that is enough."""
        used, copies = 0, []
        for entry in list(os.scandir(self._folder)):
            partial = PARTIAL_NAME.fullmatch(entry.name)
            if partial and partial[1] != name and _is_locked(self._folder / f".{partial[1]}.lock"):
                used += int(partial[2])
            elif partial:
                Path(entry.path).unlink(missing_ok=True)
            elif COPY_NAME.fullmatch(entry.name):
                state = os.stat(entry.path)
                copies.append((state.st_mtime_ns, state.st_size, entry.path))
                used += state.st_size
        limit = float("inf") if self.limit_gigabytes is None else self.limit_gigabytes * 1e9
        for _, freed, path in sorted(copies):
            if used + size <= limit:
                break
            os.unlink(path)
            used -= freed
        return used + size <= limit


def local_name(url: str) -> str:
    """Return the file name of a copy: a hash of the whole URL and its readable last part."""
    readable = re.sub(r"[^\w.-]", "_", url.partition("?")[0].rpartition("/")[2], flags=re.ASCII)[-100:]
    return f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{readable}"


def _touch(path: Path, size: int) -> bool:
    """Mark a complete copy as just used; return False if there is none of this size."""
    try:
        if path.stat().st_size != size:
            return False
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


@contextmanager
def _locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold the lock of a file; the operating system releases it if the process dies.

    Raises:
        BlockingIOError: if another process holds it and ``wait`` is False.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        try:
            yield
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing is not enough if another thread has forked
    finally:
        os.close(descriptor)


def _is_locked(path: Path) -> bool:
    try:
        with _locked(path, wait=False):
            return False
    except BlockingIOError:
        return True
