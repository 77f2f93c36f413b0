"""Files that appear under their name only when they are complete."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def partial_path(path: Path) -> Path:
    """Return the hidden temporary path beside ``path``, to which its content is written first."""
    return path.with_name(f".{path.name}.partial")


def flush(path: Path) -> None:
    """Wait until the disk holds the content of a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(partial: Path, path: Path) -> None:
    """Rename a complete file or folder to its final name in one step, and flush the rename to disk.

    An existing file of that name is replaced. A crash leaves either the old or the new one.
    """
    os.replace(partial, path)
    flush(path.parent)


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path; when the block ends without an error, flush what it wrote and publish it as ``path``.

    The parent folder is created. After an error the temporary file is removed and ``path`` is unchanged.
    """
    partial = partial_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        flush(partial)
        publish(partial, path)
    except BaseException:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file in one step, so that it holds either its old or its new content."""
    with atomic_write(path) as partial:
        partial.write_text(text)
