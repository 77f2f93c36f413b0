"""Sources to pack: image folders and tar files. Each is a list of samples in a fixed order."""

import glob
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from datamodules.index_file import NAME, IndexFile
from datamodules.remote import is_remote
from datamodules.shards import IMAGE_EXTENSIONS, Fault, ShardError, open_or_explain, samples_of, usable_row


class SourceSample(NamedTuple):
    """One encoded image and its label, in memory or in a file."""

    name: str
    """Path of its origin, relative to the source."""
    extension: str
    label: int
    path: str = ""
    offset: int = 0
    size: int = 0
    data: bytes | None = None

    def read(self) -> bytes:
        """Return the encoded image; raise OSError if its file cannot be read."""
        if self.data is not None:
            return self.data
        with open(self.path, "rb", buffering=0) as file:
            return os.pread(file.fileno(), self.size, self.offset)


class Source(NamedTuple):
    """All samples of one split."""

    samples: list[SourceSample]
    faults: list[Fault]
    """Samples that are known to be unusable without decoding them."""
    class_names: list[str] | None


def folder_source(source: Path) -> Source:
    """Return the images of a folder with one sub-folder per class; the order of the sub-folders gives the labels.

    Images may lie deeper inside a class folder. Hidden files and folders are skipped. Prints the number of files that
    are not images.

    Raises:
        FileNotFoundError: if there are no class sub-folders or no images in them.
    """
    entries = list(os.scandir(source)) if source.is_dir() else []
    classes = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    labels = {name: label for label, name in enumerate(classes)}
    samples, faults, others = [], [], []
    for name in visible_files(source) if entries else ():
        found = folder_sample(source, name, labels.get(name.split(os.sep)[0]))
        if isinstance(found, SourceSample):
            samples.append(found)
        elif isinstance(found, Fault):
            faults.append(found)
        else:
            others.append(name)
    if not samples:
        raise FileNotFoundError(f"--source {source}: no images ({', '.join(IMAGE_EXTENSIONS)}) in class sub-folders")
    if others:
        print(f"{len(others)} files in {source} are not images by their extension, the first: {others[0]}")
    return Source(samples, faults, classes)


def visible_files(folder: Path) -> Iterator[str]:
    """Yield the paths of all visible files below a folder, relative to it, in a fixed order."""

    def refuse(error: OSError) -> None:
        raise error

    for directory, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith("."):
                yield os.path.relpath(os.path.join(directory, name), folder)


def folder_sample(source: Path, name: str, label: int | None) -> SourceSample | Fault | None:
    """Return the sample of a file, or why it cannot be used, or None if it has no image extension."""
    extension = Path(name).suffix.lower().lstrip(".")
    if extension not in IMAGE_EXTENSIONS:
        return None
    path = os.path.join(source, name)
    try:
        size = os.stat(path).st_size
    except OSError as error:  # a link to nowhere
        return Fault(name, "", "unreadable", str(error.strerror))
    if label is None:
        return Fault(name, "", "missing_label", "in no class sub-folder")
    return SourceSample(name, extension, label, path, 0, size) if size else Fault(name, "", "empty_image", "no bytes")


def tar_source(pattern: str) -> Source:
    """Return the samples of WebDataset tar files, with the labels in their ``cls`` members, in any range.

    Class names come from the ``index.json`` beside the tar files, if there is one.

    Raises:
        FileNotFoundError: if nothing matches the pattern.
        ShardError: if a tar file is remote or damaged as a whole, or the class names differ.
    """
    if is_remote(pattern) or pattern.startswith("pipe:"):
        raise ShardError(f"--source {pattern!r} is not a local path: copy the tar files to this machine first")
    paths = sorted(glob.glob(pattern))
    if not paths:
        raise FileNotFoundError(f"--source {pattern!r} matches no tar file")
    samples, faults = [], []
    for path in paths:
        with open_or_explain(path) as file:
            for sample in samples_of(file):
                row = usable_row(file, Path(path).name, sample)
                if isinstance(row, Fault):
                    faults.append(row)
                else:
                    offset, size, label = row
                    extension = next(name for name in IMAGE_EXTENSIONS if name in sample.members)
                    samples.append(SourceSample(sample.key, extension, label, path, offset, size))
    if not samples:
        raise ShardError(f"--source {pattern!r}: no usable samples; {len(faults)} broken ones, the first: {faults[:1]}")
    return Source(samples, faults, class_names_beside(paths))


def class_names_beside(paths: list[str]) -> list[str] | None:
    """Return the class names of the ``index.json`` beside tar files; raise ShardError if several folders differ."""
    indices = (IndexFile.read(folder or ".") for folder in sorted({os.path.dirname(path) for path in paths}))
    found = {tuple(index.class_names) for index in indices if index and index.class_names}
    if len(found) > 1:
        raise ShardError(
            f"the {NAME} files beside {paths[0]} and others name different classes, so labels do not mean the same: "
            "pack each folder into another --output"
        )
    return list(found.pop()) if found else None


def shuffled(samples: list[SourceSample], seed: int) -> list[SourceSample]:
    """Return the samples in a random order, so that windowed shuffling and partial reading stay representative."""
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(samples))
    return [samples[place] for place in order]


def sample_key(number: int, name: str) -> str:
    """Return a key that is unique in the split and shows the origin: ``00000012-n01440764_tench``."""
    readable = re.sub(r"[^A-Za-z0-9_-]", "_", Path(name).stem)[:60]
    return f"{number:08d}-{readable}"
