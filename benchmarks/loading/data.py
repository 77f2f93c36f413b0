"""Compare the training loader with usual ones: images per CPU-second, memory, and quality of the shuffle.

Run ``python -m benchmarks.loading.photos --output photos`` first, then
``python -m benchmarks.loading.data --photos photos``. All pipelines read the
same photos from the page cache: 256 pixels, random crops, mirrored half of the time, batches of 64.
"""

import argparse
import os
import shutil
from pathlib import Path
from typing import Any

from benchmarks.harness import Case, Numbers, Results, measure_batches, medians, run_cases, table, write_report

REFERENCE = "ImageFolder + DataLoader, PIL, float32"
WARM_UP = 8
SAMPLES_PER_SHARD = 100
COPIES = 10
BYTES_PER_INDEX_ENTRY = 29


def measure_loader(pipeline: str, measured: int, **arguments: Any) -> Numbers:
    """Measure images per CPU-second of one of ``benchmarks.loading.pipelines``."""
    from benchmarks.loading import pipelines

    if pipeline == "image_folder":
        arguments["batches"] = WARM_UP + measured + 8
    loader = getattr(pipelines, pipeline)(**arguments)
    return measure_batches(loader, pipelines.BATCH_SIZE, WARM_UP, measured, count_children=pipeline != "bare_loop")


def loader_cases(photos: Path, shards: str, most_workers: int, measured: int) -> list[Case]:
    """Return cases for every loader with 1 ... ``most_workers`` workers, and for as many simultaneous bare loops."""

    def case(name: str, pipeline: str, **arguments: Any) -> Case:
        arguments = {"pipeline": pipeline, "measured": measured, **arguments}
        return Case(name, "benchmarks.loading.data:measure_loader", arguments)

    cases = []
    for workers in range(1, most_workers + 1):
        suffix = worker_suffix(workers)
        cases += [
            case("bare loop" + suffix, "bare_loop", photos=str(photos), companions=workers - 1),
            case(REFERENCE + suffix, "image_folder", photos=str(photos), num_workers=workers),
            case("webdataset, PIL, float32" + suffix, "webdataset", shards=shards, num_workers=workers, fast=False),
            case(
                "webdataset, our fast transform" + suffix, "webdataset", shards=shards, num_workers=workers, fast=True
            ),
            case("suite" + suffix, "suite", shards=shards, num_workers=workers),
        ]
    return cases


def memory_cases(shards: dict[str, str], most_workers: int, measured: int) -> list[Case]:
    """Return cases for the suite on each set of shards, with the same number of batches."""
    arguments = {"pipeline": "suite", "num_workers": most_workers, "measured": measured}
    return [
        Case(name, "benchmarks.loading.data:measure_loader", {**arguments, "shards": pattern})
        for name, pattern in shards.items()
    ]


def pack(photos: Path, folder: Path) -> str:
    """Pack the photos once and return the pattern of the shards."""
    from datamodules.pack import main as pack_shards

    if not list(folder.glob("train-*.tar")):
        pack_shards(["--source", str(photos), "--output", str(folder), "--samples-per-shard", str(SAMPLES_PER_SHARD)])
    for path in folder.glob("train-*.tar"):
        path.read_bytes()  # into the page cache
    return str(folder / "train-*.tar")


def pack_copies(photos: Path, folder: Path) -> str:
    """Pack every photo ten times under different keys and return the pattern of the shards."""
    links = folder.with_name(folder.name + "-links")
    shutil.rmtree(links, ignore_errors=True)
    for path in sorted(photos.rglob("*.jpg")):
        target = links / path.parent.name
        target.mkdir(parents=True, exist_ok=True)
        for copy in range(COPIES):
            os.symlink(path.resolve(), target / f"{path.stem}-{copy}.jpg")
    pattern = pack(links, folder)
    shutil.rmtree(links)
    return pattern


def worker_suffix(workers: int) -> str:
    """Return the end of the names of the cases with this many workers."""
    return f", {workers} worker{'s' * (workers > 1)}"


def speed_section(results: Results, most_workers: int) -> str:
    """For each number of workers, compare all loaders with the usual one, and the suite with two further references."""
    tables = []
    for suffix in map(worker_suffix, range(1, most_workers + 1)):
        part = {name.removesuffix(suffix): numbers for name, numbers in results.items() if name.endswith(suffix)}
        tables.append(f"### {suffix[2:]}\n\n{table(part, 'samples_per_cpu_second', REFERENCE)}")
        for other in ("webdataset, our fast transform", "bare loop"):
            tables.append(table({name: part[name] for name in ("suite", other)}, "samples_per_cpu_second", other))
    return "\n\n".join(tables)


def memory_section(results: Results, samples: int) -> str:
    """Report peak memory of the main process and the largest worker, and the size of the index of the added samples."""
    lines = ["| case | peak of main process, MiB | peak of largest worker, MiB |", "|---|---|---|"]
    for name, numbers in medians(results).items():
        lines.append(f"| {name} | {numbers['peak_main_mib']:.1f} | {numbers['peak_worker_mib']:.1f} |")
    index = samples * (COPIES - 1) * BYTES_PER_INDEX_ENTRY / 2**20
    return "\n".join(
        [*lines, "", f"The index of the added samples takes {index:.1f} MiB ({BYTES_PER_INDEX_ENTRY} bytes each)."]
    )


def main(args: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loading.data", description=__doc__)
    parser.add_argument(
        "--photos", required=True, type=Path, help="image folder of python -m benchmarks.loading.photos"
    )
    parser.add_argument("--shards", type=Path, help="where shards are written and kept; beside the photos if not given")
    parser.add_argument("--workers", default=2, type=int, help="cases for 1 to this many loader workers")
    parser.add_argument("--repeats", default=5, type=int)
    parser.add_argument("--batches", default=40, type=int, help="measured batches of each case")
    parser.add_argument("--only", nargs="+", default=["speed", "memory", "shuffle"], help="parts to run")
    parser.add_argument("--output", type=Path, help="write OUTPUT.md and OUTPUT.json")
    options = parser.parse_args(args)
    folder = options.shards or options.photos.with_name(options.photos.name + "-shards")
    sections: dict[str, str] = {}
    results: Results = {}
    if "speed" in options.only:
        shards = pack(options.photos, folder / "once")
        results = run_cases(loader_cases(options.photos, shards, options.workers, options.batches), options.repeats)
        sections["Images per CPU-second"] = speed_section(results, options.workers)
    if "memory" in options.only:
        patterns = {
            "suite, memory": pack(options.photos, folder / "once"),
            f"suite, memory, {COPIES} times the shards": pack_copies(options.photos, folder / "copies"),
        }
        memory = run_cases(memory_cases(patterns, options.workers, options.batches), options.repeats)
        sections["Peak memory"] = memory_section(memory, sum(1 for _ in options.photos.rglob("*.jpg")))
        results |= memory
    if "shuffle" in options.only:
        from benchmarks.loading.shuffle import shuffle_table

        sections["Quality of the shuffle"] = shuffle_table()
    write_report(options.output, "Loading images", sections, results)


if __name__ == "__main__":
    main()
