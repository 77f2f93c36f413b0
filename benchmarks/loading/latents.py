"""Compare latents per CPU-second from the cache and from webdataset: ``python -m benchmarks.loading.latents``.

65,536 latents of 128 x 32 float16 are read in random order in batches of 256, from the page cache.
"""

import argparse
import glob
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Case, Numbers, measure_batches, run_cases, table, write_report
from maetok.formats import latent_cache

SAMPLES, SHAPE = 65_536, (128, 32)
SAMPLES_PER_SHARD = 4096
BATCH_SIZE = 256
REFERENCE = "webdataset, .npy members, 2 workers"
CASES = {
    REFERENCE: ("webdataset_loader", 2),
    "webdataset, .npy members, in process": ("webdataset_loader", 0),
    "suite, 2 workers": ("suite_loader", 2),
    "suite, in process": ("suite_loader", 0),
}
MEASURED = {"webdataset_loader": 80, "suite_loader": 2000}
WARM_UP = 20


def write_webdataset(latents: np.ndarray, folder: Path) -> None:
    """Write one .npy member for each latent with webdataset's own writer."""
    import webdataset

    folder.mkdir(parents=True)
    pattern = str(folder / "train-%06d.tar")
    with webdataset.ShardWriter(pattern, maxcount=SAMPLES_PER_SHARD, verbose=0) as writer:
        for number, latent in enumerate(latents):
            writer.write({"__key__": f"{number:08d}", "npy": latent, "cls": number % 1000})


def write_cache(latents: np.ndarray, folder: Path) -> None:
    """Write the same latents with the same labels as the suite's cache."""
    labels = np.arange(len(latents)) % 1000
    splits = {"train": (latents, labels), "validation": (latents[:BATCH_SIZE], labels[:BATCH_SIZE])}
    latent_cache.write_cache(folder, splits, SAMPLES_PER_SHARD)


def webdataset_loader(folder: str, num_workers: int) -> Any:
    """Return WebDataset over resampled shards with a full shuffle buffer; np.load decodes each member."""
    import webdataset as wds

    urls = sorted(glob.glob(f"{folder}/webdataset/*.tar"))
    dataset = wds.WebDataset(urls, resampled=True, shardshuffle=False).shuffle(1000, initial=1000)
    dataset = dataset.decode().to_tuple("npy", "cls").batched(BATCH_SIZE, partial=False)
    workers = {"prefetch_factor": 2} if num_workers else {}
    return wds.WebLoader(dataset, batch_size=None, num_workers=num_workers, **workers)


def suite_loader(folder: str, num_workers: int) -> Any:
    """Return the endless training loader of ``datamodules.LatentShards``."""
    import datamodules

    data = datamodules.LatentShards(
        cache=f"{folder}/cache", batch_size=BATCH_SIZE, loading=datamodules.Loading(num_workers=num_workers)
    )
    data.setup("fit")
    return data.train_dataloader()


def measure_loader(loader: str, folder: str, num_workers: int, measured: int) -> Numbers:
    """Measure latents per CPU-second of one of these loaders."""
    batches = globals()[loader](folder, num_workers)
    return measure_batches(batches, BATCH_SIZE, WARM_UP, measured)


def write_data(folder: Path, loaders: set[str]) -> None:
    """Write the data of the loaders once."""
    latents = np.random.default_rng(0).standard_normal((SAMPLES, *SHAPE), dtype=np.float32).astype(np.float16)
    forms = {"webdataset_loader": ("webdataset", write_webdataset), "suite_loader": ("cache", write_cache)}
    for name, write in (forms[loader] for loader in sorted(loaders)):
        if not (folder / name).exists():
            write(latents, folder / name)


def main(args: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loading.latents", description=__doc__)
    parser.add_argument("--folder", required=True, type=Path, help="folder where the latents are kept (1.4 GB)")
    parser.add_argument("--repeats", default=5, type=int)
    parser.add_argument("--only", nargs="+", default=list(CASES), choices=list(CASES), help="cases to run")
    parser.add_argument("--output", type=Path, help="write OUTPUT.md and OUTPUT.json")
    options = parser.parse_args(args)
    write_data(options.folder, {CASES[name][0] for name in options.only})
    cases = []
    for name in options.only:
        loader, workers = CASES[name]
        arguments = {"loader": loader, "folder": str(options.folder), "num_workers": workers}
        cases.append(
            Case(name, "benchmarks.loading.latents:measure_loader", {**arguments, "measured": MEASURED[loader]})
        )
    results = run_cases(cases, options.repeats)
    reference = REFERENCE if REFERENCE in results else options.only[0]
    sections = {"Latents per CPU-second": table(results, "samples_per_cpu_second", reference)}
    write_report(options.output, "Reading latents", sections, results)


if __name__ == "__main__":
    main()
