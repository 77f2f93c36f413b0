"""Write WebDataset shards: ``python -m datamodules.pack --source IMAGE_FOLDER|digits --output FOLDER``."""

import argparse
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from datamodules.digits import TRAIN_SAMPLES, VALIDATION_SAMPLES, digit_splits
from datamodules.shards import IMAGE_EXTENSIONS

Sample = dict[str, Any]


def write_shards(samples: Iterable[Sample], folder: Path, split: str, samples_per_shard: int, total: int) -> list[Path]:
    """Write samples as ``<split>-000000.tar`` and so on; the files get their names when all are complete.

    Args:
        samples: WebDataset samples: ``__key__``, an image by extension, ``cls``.
        folder: where to write; created if missing.
        split: first part of the file names.
        samples_per_shard: the last shard may hold fewer.
        total: number of samples, for the progress bar.

    Returns:
        The paths of the shards.
    """
    import webdataset

    partial = folder / f".{split}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    pattern = str(partial / f"{split}-%06d.tar")
    with webdataset.ShardWriter(pattern, maxcount=samples_per_shard, maxsize=1e12, verbose=0, mtime=0) as writer:
        for sample in tqdm(samples, total=total, desc=f"pack {split}", unit="image"):
            writer.write(sample)
    for stale in folder.glob(f"{split}-*.tar"):
        stale.unlink()
    paths = [folder / path.name for path in sorted(partial.iterdir())]
    for path in paths:
        os.replace(partial / path.name, path)
    partial.rmdir()
    return paths


def pack_digits(folder: Path, samples_per_shard: int = 1000) -> None:
    """Write the embedded digits as ``train-*.tar`` and ``validation-*.tar`` of PNG images."""
    totals = {"train": TRAIN_SAMPLES, "validation": VALIDATION_SAMPLES}
    for split, samples in digit_splits().items():
        encoded = ({"__key__": key, "png": image, "cls": label} for key, image, label in samples)
        write_shards(encoded, folder, split, samples_per_shard, totals[split])


def folder_samples(source: Path, seed: int) -> tuple[list[str], list[tuple[Path, int]]]:
    """Class names and (file, label) of an image folder with one sub-folder per class, in a random order.

    Raises:
        FileNotFoundError: if there are no class sub-folders or no images in them.
    """
    classes = sorted(path.name for path in source.iterdir() if path.is_dir()) if source.is_dir() else []
    files = [
        (path, label)
        for label, name in enumerate(classes)
        for path in sorted((source / name).iterdir())
        if path.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS
    ]
    if not files:
        raise FileNotFoundError(f"--source {source}: no images ({', '.join(IMAGE_EXTENSIONS)}) in class sub-folders")
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(files))
    return classes, [files[place] for place in order]


def pack_folder(source: Path, folder: Path, split: str, samples_per_shard: int = 1000, seed: int = 0) -> None:
    """Copy an image folder into shards, image bytes unchanged, shuffled; ``classes.json`` names the labels.

    Raises:
        ValueError: if another split in the same folder was packed with other classes.
    """
    classes, files = folder_samples(source, seed)
    names = folder / "classes.json"
    if names.is_file() and json.loads(names.read_text()) != classes:
        raise ValueError(
            f"the class folders of {source} are not those of {names}, so labels would not mean the same: complete the "
            "folders, or write to another --output"
        )

    def samples() -> Iterator[Sample]:
        for number, (path, label) in enumerate(files):
            yield {"__key__": f"{number:08d}", path.suffix.lower().lstrip("."): path.read_bytes(), "cls": label}

    write_shards(samples(), folder, split, samples_per_shard, len(files))
    names.write_text(json.dumps(classes, indent=0))


def main(args: list[str] | None = None) -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(prog="python -m datamodules.pack", description=__doc__)
    parser.add_argument("--source", required=True, help="an image folder with one sub-folder per class, or: digits")
    parser.add_argument("--output", required=True, type=Path, help="folder for the shards")
    parser.add_argument("--split", default="train", help="first part of the file names (not for digits)")
    parser.add_argument("--samples-per-shard", default=1000, type=int)
    options = parser.parse_args(args)
    if options.source == "digits":
        pack_digits(options.output, options.samples_per_shard)
    else:
        pack_folder(Path(options.source), options.output, options.split, options.samples_per_shard)
    print(f"shards in {options.output}:", *sorted(path.name for path in options.output.glob("*.tar")))


if __name__ == "__main__":
    main()
