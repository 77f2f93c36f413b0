"""What can be packed: image folders, tar files, the embedded digits. Each is a list of samples in a fixed order."""

import glob
import io
import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from datamodules.shards import IMAGE_EXTENSIONS, Fault, ShardError, open_or_explain, samples_of, usable_row


class SourceSample(NamedTuple):
    """One encoded image and its label, in memory or somewhere in a file."""

    name: str
    """Of its origin, relative to the source."""
    extension: str
    label: int
    path: str = ""
    offset: int = 0
    size: int = 0
    data: bytes | None = None

    def read(self) -> bytes:
        """The encoded image; raises OSError if its file cannot be read."""
        if self.data is not None:
            return self.data
        with open(self.path, "rb", buffering=0) as file:
            return os.pread(file.fileno(), self.size, self.offset)


class Source(NamedTuple):
    """All samples of one split."""

    samples: list[SourceSample]
    faults: list[Fault]
    """Samples of the source that are seen to be unusable without decoding them."""
    class_names: list[str] | None


def folder_source(source: Path) -> Source:
    """An image folder with one sub-folder per class, whose order gives the labels.

    Raises:
        FileNotFoundError: if there are no class sub-folders or no images in them.
    """
    classes = sorted(entry.name for entry in os.scandir(source) if entry.is_dir()) if source.is_dir() else []
    samples, faults = [], []
    for label, name in enumerate(classes):
        for entry in sorted(os.scandir(source / name), key=lambda entry: entry.name):
            extension = Path(entry.name).suffix.lower().lstrip(".")
            if extension not in IMAGE_EXTENSIONS or entry.name.startswith("."):
                continue
            size = entry.stat().st_size
            if size:
                samples.append(SourceSample(f"{name}/{entry.name}", extension, label, entry.path, 0, size))
            else:
                faults.append(Fault(f"{name}/{entry.name}", "", "empty_image", "the file has no bytes"))
    if not samples:
        raise FileNotFoundError(f"--source {source}: no images ({', '.join(IMAGE_EXTENSIONS)}) in class sub-folders")
    return Source(samples, faults, classes)


def tar_source(pattern: str) -> Source:
    """The samples of WebDataset tar files; labels are those of their ``cls`` members, whatever their range.

    Raises:
        FileNotFoundError: if nothing matches the pattern.
        ShardError: if a tar file is damaged as a whole.
    """
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
    return Source(samples, faults, None)


def digit_sources() -> dict[str, Source]:
    """The embedded digits as PNG, by split."""
    from PIL import Image

    from datamodules.digits import TRAIN_SAMPLES, digit_images

    images, labels = digit_images()

    def source(start: int, stop: int) -> Source:
        samples = []
        for number in range(start, stop):
            buffer = io.BytesIO()
            Image.fromarray(images[number]).convert("RGB").save(buffer, "PNG")
            samples.append(SourceSample(f"digit{number:05d}", "png", int(labels[number]), data=buffer.getvalue()))
        return Source(samples, [], [str(digit) for digit in range(10)])

    return {"train": source(0, TRAIN_SAMPLES), "validation": source(TRAIN_SAMPLES, len(images))}


def shuffled(samples: list[SourceSample], seed: int) -> list[SourceSample]:
    """The samples in a random order, which makes windowed shuffling and partial reading harmless."""
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(samples))
    return [samples[place] for place in order]


def sample_key(number: int, name: str) -> str:
    """A key that no other sample of the split has and that tells the origin: ``00000012-n01440764_tench``."""
    readable = re.sub(r"[^A-Za-z0-9_-]", "_", Path(name).stem)[:60]
    return f"{number:08d}-{readable}"
