"""Cost of the analysis against the number of latents and of components: ``python -m benchmarks.analysis``.

Latents are 128 x 32 as in the paper, in 100 classes. The whole analysis is ``python -m maetok.analysis`` with its
defaults on a cache of 20,000 latents; it should take less than 5 minutes and 8 GiB on 2 cores.
"""

import argparse
import multiprocessing
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Case, Numbers, Results, medians, peak_memory, run_cases, write_report
from maetok.analysis import PrincipalComponents, fit_mixtures
from maetok.analysis.gmm import PAPER_COMPONENT_COUNTS

SHAPE, CLASSES, FACTORS = (128, 32), 100, 64
LATENTS = 20_000
MIXTURES: dict[str, dict[str, Any]] = {
    "full, 16 dimensions": {"covariance_type": "full", "dimensions": 16},
    "full, 32 dimensions": {"covariance_type": "full", "dimensions": 32},
    "diagonal, 64 dimensions": {"covariance_type": "diag", "dimensions": 64},
}
FIXED_ITERATIONS, FIXED_COMPONENTS = 5, 50
WHOLE = "whole analysis"


def sample_counts(latents: int) -> list[int]:
    """Return an eighth, a quarter, a half and all of the latents."""
    return [latents // 8, latents // 4, latents // 2, latents]


def synthetic_latents(samples: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return latents (n, 128, 32) float32 and labels (n,).

    Classes differ in factors of falling variance, which are spread over all values; noise is added.
    """
    rng = np.random.default_rng(0)
    scale = (1 + np.arange(FACTORS)) ** -0.5
    centres = rng.standard_normal((CLASSES, FACTORS)) * scale
    directions = np.linalg.qr(rng.standard_normal((SHAPE[0] * SHAPE[1], FACTORS)))[0].T.astype(np.float32)
    rng, labels = np.random.default_rng([1, seed]), np.arange(samples) % CLASSES
    factors = centres[labels] + 0.7 * scale * rng.standard_normal((samples, FACTORS))
    latents = rng.standard_normal((samples, directions.shape[1]), dtype=np.float32)
    latents *= 0.01
    latents += factors.astype(np.float32) @ directions
    return latents.reshape(samples, *SHAPE), labels


def write_cache(folder: Path, latents: int) -> None:
    """Write a latent cache in float16, with a tenth as many samples in validation."""
    from maetok.formats import latent_cache

    splits = {}
    for seed, (split, samples) in enumerate({"train": latents, "validation": latents // 10}.items()):
        values, labels = synthetic_latents(samples, seed)
        splits[split] = values.astype(np.float16), labels
    latent_cache.write_cache(folder, splits, samples_per_shard=1000)


def load_libraries() -> None:
    """Import the libraries that an analysis imports at its first call."""
    points = np.random.default_rng(0).standard_normal((20, 2))
    fit_mixtures(PrincipalComponents.fit(points).standardised(points, 2), points, [2], restarts=1)


def measure_samples(samples: int) -> Numbers:
    """Measure CPU-seconds of the projection and of an iteration of each kind of mixture, and peak memory."""
    load_libraries()
    latents, _ = synthetic_latents(samples)
    started = time.process_time()
    components = PrincipalComponents.fit(latents)
    numbers = {"projection": time.process_time() - started}
    for name, mixture in MIXTURES.items():
        points = components.standardised(latents, mixture["dimensions"])
        numbers[name] = seconds_per_iteration(points, FIXED_COMPONENTS, mixture["covariance_type"])
    return {**numbers, "peak_mib": peak_memory(os.getpid())}


def measure_components(mixture: str, samples: int) -> Numbers:
    """Measure CPU-seconds of an iteration with each of the paper's numbers of components, on normal points.

    The cost of an iteration does not depend on the positions of the points.
    """
    load_libraries()
    arguments = MIXTURES[mixture]
    points = np.random.default_rng(0).standard_normal((samples, arguments["dimensions"]))
    return {
        str(count): seconds_per_iteration(points, count, arguments["covariance_type"])
        for count in PAPER_COMPONENT_COUNTS
    }


def seconds_per_iteration(points: np.ndarray, components: int, covariance_type: Any) -> float:
    """Return the CPU-seconds of one start and its iterations, divided by the number of iterations."""
    options: dict[str, Any] = {"covariance_type": covariance_type, "restarts": 1, "max_iterations": FIXED_ITERATIONS}
    started = time.process_time()
    (fit,) = fit_mixtures(points, points[:10], [components], **options)
    return (time.process_time() - started) / fit.iterations


def measure_whole(latents: int, threads: int, options: list[str]) -> Numbers:
    """Measure seconds, CPU-seconds and peak memory of ``python -m maetok.analysis`` without the start of Python."""
    import torch
    from threadpoolctl import threadpool_limits

    from maetok.analysis.command import main
    from maetok.analysis.modes import read_json

    with tempfile.TemporaryDirectory() as folder:
        cache, output = Path(folder) / "cache", Path(folder) / "output"
        cache.mkdir()
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:  # keeps its memory apart
            pool.submit(write_cache, cache, latents).result()
        torch.set_num_threads(threads)
        cpu, started = time.process_time(), time.perf_counter()
        with threadpool_limits(threads):
            main([str(cache), f"--output={output}", f"--per-class={latents // CLASSES}", *options])
        numbers = {
            "seconds": time.perf_counter() - started,
            "cpu_seconds": time.process_time() - cpu,
            "peak_mib": peak_memory(os.getpid()),
        }
        (analysis,) = read_json(output / "modes.json")
    return {
        **numbers,
        "threads": threads,
        "samples": analysis.samples,
        "held_out_samples": analysis.held_out_samples,
        "dimensions": analysis.dimensions,
        "explained_variance": analysis.explained_variance,
        **{f"iterations of {fit.components}": fit.iterations for fit in analysis.fits},
    }


def draw(results: Results, latents: int, path: Path) -> None:
    """Draw costs against the number of latents and of components."""
    from matplotlib.figure import Figure

    numbers, samples = medians(results), sample_counts(latents)
    figure = Figure(figsize=(10, 4), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, name in enumerate((*MIXTURES, "projection")):
        costs = [numbers[case_name(count)][name] for count in samples]
        label = name if name == "projection" else f"{name}: an iteration of {FIXED_COMPONENTS} components"
        left.loglog(samples, costs, ".-", color=f"C{number}", label=label)
    left.set(xlabel="latents of 4,096 values", ylabel="CPU-seconds")
    left.set_xticks(samples, labels=[f"{count:,}" for count in samples])
    for number, name in enumerate(MIXTURES):
        costs = [numbers[name][str(count)] for count in PAPER_COMPONENT_COUNTS]
        right.loglog(PAPER_COMPONENT_COUNTS, costs, ".-", color=f"C{number}", label=name)
    right.set(xlabel=f"components ({latents:,} latents)", ylabel="CPU-seconds per iteration")
    right.set_xticks(PAPER_COMPONENT_COUNTS, labels=[str(count) for count in PAPER_COMPONENT_COUNTS])
    for axes in (left, right):
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path)


def case_name(samples: int) -> str:
    """Return the name of the case with this number of latents."""
    return f"{samples:,} latents"


def sections(results: Results, latents: int) -> dict[str, str]:
    """Return the sections of the report as Markdown."""
    numbers = medians(results)
    columns = ["projection", *MIXTURES, "peak_mib"]
    against_samples = ["| latents | " + " | ".join(columns).replace("peak_mib", "peak memory (MiB)") + " |",
                       "|---" * (1 + len(columns)) + "|"]  # fmt: skip
    for samples in sample_counts(latents):
        cells = [f"{numbers[case_name(samples)][column]:.4g}" for column in columns]
        against_samples.append(f"| {samples:,} | {' | '.join(cells)} |")
    counts = [str(count) for count in PAPER_COMPONENT_COUNTS]
    against_components = ["| mixture | " + " | ".join(counts) + " |", "|---" * (1 + len(counts)) + "|"]
    for name in MIXTURES:
        against_components.append(f"| {name} | {' | '.join(f'{numbers[name][count]:.3g}' for count in counts)} |")
    return {
        "The whole analysis": whole_analysis(numbers[WHOLE], counts),
        f"CPU-seconds of the projection, and of one iteration of {FIXED_COMPONENTS} components": "\n".join(
            against_samples
        ),
        f"CPU-seconds of one iteration against the number of components, {latents:,} latents": "\n".join(
            against_components
        ),
    }


def whole_analysis(whole: Numbers, counts: list[str]) -> str:
    """Return the paragraph on the whole analysis."""
    iterations = ", ".join(f"{whole[f'iterations of {count}']:.0f}" for count in counts)
    return (
        f"`python -m maetok.analysis` on a cache of {whole['samples']:,.0f} training latents of 4,096 values, "
        f"{whole['held_out_samples']:,.0f} held out, with {', '.join(counts)} components (full covariances, "
        f"3 restarts, {whole['dimensions']:.0f} dimensions with {whole['explained_variance']:.1%} of the variance) and "
        f"{whole['threads']:.0f} threads took {whole['seconds']:.0f} seconds, {whole['cpu_seconds']:.0f} CPU-seconds "
        f"and {whole['peak_mib'] / 1024:.2f} GiB of memory at most. The best starts took {iterations} iterations."
    )


def main(args: list[str] | None = None) -> None:
    """Run the cases and write the report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.analysis", description=__doc__)
    parser.add_argument("--latents", default=LATENTS, type=int, help="largest number of latents, at least 2,400")
    parser.add_argument("--dimensions", type=int, help="of the whole analysis; default: over 90 %% of the variance")
    parser.add_argument("--repeats", default=1, type=int)
    parser.add_argument("--output", type=Path, help="write OUTPUT.md, OUTPUT.json and OUTPUT.png")
    options = parser.parse_args(args)
    module, latents = "benchmarks.analysis", options.latents
    cases = [
        Case(case_name(samples), f"{module}:measure_samples", {"samples": samples})
        for samples in sample_counts(latents)
    ]
    cases += [Case(name, f"{module}:measure_components", {"mixture": name, "samples": latents}) for name in MIXTURES]
    dimensions = [] if options.dimensions is None else [f"--dimensions={options.dimensions}"]
    whole = {"latents": latents, "threads": 2, "options": dimensions}
    cases.append(Case(WHOLE, f"{module}:measure_whole", whole))
    results = run_cases(cases, options.repeats)
    write_report(options.output, "Analysis of latents", sections(results, latents), results)
    if options.output is not None:
        draw(results, latents, options.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
