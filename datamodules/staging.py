"""Copies of remote shards on node-local disk, within a size limit.

The processes of a node share them and meet only through files and their locks.
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

from datamodules.remote import check_location, download, expand, is_remote, read_bytes, sizes
from datamodules.shards import ShardError
from maetok.formats.files import publish

__all__ = ["Staging", "check_location", "expand", "is_remote", "local_name", "read_bytes", "sizes"]

COPY_NAME = re.compile(r"[0-9a-f]{16}-.*")
PARTIAL_NAME = re.compile(r"\.([0-9a-f]{16}-.*)\.(\d+)\.partial")


@dataclass(frozen=True)
class Staging:
    """Where copies of remote shards lie, shared by all processes of a node.

    Args:
        directory: on node-local disk; created if missing. Files of other names in it are left alone.
        limit_gigabytes: size of all copies together, in 1e9 bytes; the least recently used ones are deleted to keep it.
            None: no limit. A deleted copy takes space for as long as a process has it open.
    """

    directory: str
    limit_gigabytes: float | None = None

    def __post_init__(self) -> None:
        if not self.directory or is_remote(self.directory):
            raise ValueError(f"data.init_args.staging.directory={self.directory!r} must be a folder on a local disk")
        if self.limit_gigabytes is not None and not self.limit_gigabytes > 0:
            raise ValueError(
                f"data.init_args.staging.limit_gigabytes={self.limit_gigabytes} must be positive, or null for no limit"
            )

    def open(self, url: str, size: int) -> BinaryIO:
        """The copy, opened; it stays readable even if another process then deletes it to make room."""
        while True:
            try:
                return open(self.path(url, size), "rb", buffering=0)
            except FileNotFoundError:  # deleted between the two
                time.sleep(0.01)

    def path(self, url: str, size: int) -> str:
        """Path of the copy of a shard of ``size`` bytes, downloaded unless it is there.

        Raises:
            ShardError: if the download fails repeatedly, or there is no room for it.
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
                    if not _touch(local, size):  # another process may have downloaded it meanwhile
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
        """Download under a temporary name, check the size, rename. The lock of the shard is held."""
        partial = self._reserve(local.name, size)
        try:
            download(url, str(partial), size)
            with _locked(self._folder / ".lock"):
                publish(partial, local)
        finally:
            partial.unlink(missing_ok=True)

    def _reserve(self, name: str, size: int) -> Path:
        """An empty temporary file whose name tells how much room it will take; waits for other downloads if need be."""
        partial = self._folder / f".{name}.{size}.partial"
        while True:
            with _locked(self._folder / ".lock"):
                if self._make_room(name, size):
                    partial.touch()
                    return partial
            time.sleep(0.05)

    def _make_room(self, name: str, size: int) -> bool:
        """Delete what dead processes left and, oldest first, as many copies as needed; False if that is not enough."""
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
    """File name of a copy: a hash of the whole URL, and its last part to be read by people."""
    readable = re.sub(r"[^\w.-]", "_", url.partition("?")[0].rpartition("/")[2], flags=re.ASCII)[-100:]
    return f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{readable}"


def _touch(path: Path, size: int) -> bool:
    """Mark a complete copy as just used; False if there is none of this size."""
    try:
        if path.stat().st_size != size:
            return False
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


@contextmanager
def _locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold the lock of a file, which the operating system releases if the process dies.

    Raises:
        BlockingIOError: if another one holds it and ``wait`` is False.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        try:
            yield
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing is not enough if another thread forked meanwhile
    finally:
        os.close(descriptor)


def _is_locked(path: Path) -> bool:
    try:
        with _locked(path, wait=False):
            return False
    except BlockingIOError:
        return True
