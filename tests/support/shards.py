"""Small shards of known content for tests."""

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from datamodules import ImageShards, Loading
from datamodules.pack.__main__ import main as pack

Member = tuple[str, bytes]


def encoded(size: tuple[int, int] = (8, 8), form: str = "PNG", seed: int = 0, **options: Any) -> bytes:
    """Return an encoded random picture of (height, width)."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, form, **options)
    return buffer.getvalue()


def write_tar(path: Path, members: list[Member]) -> Path:
    """Write a tar file with these members, using Python's tarfile."""
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def write_shards(folder: Path, counts: list[int], split: str = "train", classes: int = 10) -> list[bytes]:
    """Write shards with these numbers of samples and sorted labels; return the images in stored order."""
    folder.mkdir(parents=True, exist_ok=True)
    total, number, images = sum(counts), 0, []
    for shard, count in enumerate(counts):
        members: list[Member] = []
        for _ in range(count):
            images.append(encoded((10, 12), seed=number))
            members += [(f"{number:04d}.png", images[-1]), (f"{number:04d}.cls", b"%d" % (number * classes // total))]
            number += 1
        write_tar(folder / f"{split}-{shard:06d}.tar", members)
    return images


def image_shards(folder: Path, workers: int = 0, stage: str | None = "fit", **options: Any) -> ImageShards:
    """Return the datamodule of a folder of shards, set up unless ``stage`` is None."""
    defaults = {"image_size": 8, "num_classes": 10, "batch_size": 2, "loading": Loading(num_workers=workers)}
    data = ImageShards(f"{folder}/train-*.tar", f"{folder}/validation-*.tar", **(defaults | options))
    if stage:
        data.setup(stage)
    return data


def run_pack(source: Path | str, output: Path, *options: str) -> None:
    """Run the packing command in this process, with four samples per shard."""
    pack(["--source", str(source), "--output", str(output), "--samples-per-shard", "4", "--jobs", "0", *options])
