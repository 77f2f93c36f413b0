"""Cost of the analysis of latents, against their number and that of components: ``python -m benchmarks.analysis``.

Latents are 128 x 32 as the paper's, made of 100 classes; 20,000 of them with all of the paper's numbers of components
should take less than 5 minutes and 8 GiB on 2 cores.
"""

import argparse
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Case, Numbers, Results, medians, peak_memory, run_cases, write_report
from maetok.analysis import PrincipalComponents, analyse_modes, fit_mixtures
from maetok.analysis.gmm import PAPER_COMPONENT_COUNTS

SHAPE, CLASSES, FACTORS = (128, 32), 100, 64
SAMPLES = (2500, 5000, 10_000, 20_000)
HELD_OUT = 2000
MIXTURES: dict[str, dict[str, Any]] = {
    "full, 16 dimensions": {"covariance_type": "full", "dimensions": 16},
    "full, 32 dimensions": {"covariance_type": "full", "dimensions": 32},
    "diagonal, 64 dimensions": {"covariance_type": "diag", "dimensions": 64},
}
FIXED_ITERATIONS, FIXED_COMPONENTS = 10, 50
WHOLE = "20,000 latents, 5 ... 300 components, full, 16 dimensions, 3 restarts, 2 threads"


def synthetic_latents(samples: int) -> np.ndarray:
    """(n, 128, 32) float32: classes in factors of falling variance, spread over all values, and noise."""
    generator = np.random.default_rng(0)
    scale = (1 + np.arange(FACTORS)) ** -0.5
    centres = generator.standard_normal((CLASSES, FACTORS)) * scale
    directions = np.linalg.qr(generator.standard_normal((SHAPE[0] * SHAPE[1], FACTORS)))[0].T.astype(np.float32)
    labels = generator.integers(CLASSES, size=samples)
    factors = centres[labels] + 0.7 * scale * generator.standard_normal((samples, FACTORS))
    noise = generator.standard_normal((samples, directions.shape[1]), dtype=np.float32)
    return (factors.astype(np.float32) @ directions + 0.01 * noise).reshape(samples, *SHAPE)


def measure_samples(samples: int) -> Numbers:
    """CPU-seconds of the projection, and of an iteration of each kind of mixture; peak memory."""
    latents = synthetic_latents(samples)
    started = time.process_time()
    components = PrincipalComponents.fit(latents)
    numbers = {"projection": time.process_time() - started}
    for name, mixture in MIXTURES.items():
        points = components.standardised(latents, mixture["dimensions"])
        numbers[name] = seconds_per_iteration(points, FIXED_COMPONENTS, mixture["covariance_type"])
    return {**numbers, "peak_mib": peak_memory(os.getpid())}


def measure_components(mixture: str) -> Numbers:
    """CPU-seconds of an iteration with each of the paper's numbers of components, on the most samples."""
    latents = synthetic_latents(max(SAMPLES))
    arguments = MIXTURES[mixture]
    points = PrincipalComponents.fit(latents).standardised(latents, arguments["dimensions"])
    return {str(count): seconds_per_iteration(points, count, arguments["covariance_type"]) for count in
            PAPER_COMPONENT_COUNTS}  # fmt: skip


def seconds_per_iteration(points: np.ndarray, components: int, covariance_type: Any) -> float:
    """CPU-seconds of one start and its iterations, divided by their number."""
    options: dict[str, Any] = {"covariance_type": covariance_type, "restarts": 1, "max_iterations": FIXED_ITERATIONS}
    started = time.process_time()
    (fit,) = fit_mixtures(points, points[:1000], [components], **options)
    return (time.process_time() - started) / fit.iterations


def measure_whole(threads: int) -> Numbers:
    """Seconds, CPU-seconds and peak memory of everything that ``python -m maetok.analysis`` does with the latents."""
    import torch
    from threadpoolctl import threadpool_limits

    latents = synthetic_latents(max(SAMPLES) + HELD_OUT)
    torch.set_num_threads(threads)
    cpu, started = time.process_time(), time.perf_counter()
    with threadpool_limits(threads):
        analysis = analyse_modes("", latents[:-HELD_OUT], latents[-HELD_OUT:], PAPER_COMPONENT_COUNTS, dimensions=16)
    return {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu,
        "peak_mib": peak_memory(os.getpid()),
        "explained_variance": analysis.explained_variance,
        **{f"iterations of {fit.components}": fit.iterations for fit in analysis.fits},
    }


def draw(results: Results, path: Path) -> None:
    """Costs against the number of latents and of components."""
    from matplotlib.figure import Figure

    numbers = medians(results)
    figure = Figure(figsize=(10, 4), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in ("projection", *MIXTURES):
        costs = [numbers[f"{samples:,} latents"][name] for samples in SAMPLES]
        label = name if name == "projection" else f"{name}: an iteration of {FIXED_COMPONENTS} components"
        left.loglog(SAMPLES, costs, ".-", label=label)
    left.set(xlabel="latents of 4,096 values", ylabel="CPU-seconds")
    left.set_xticks(SAMPLES, labels=[f"{samples:,}" for samples in SAMPLES])
    for name in MIXTURES:
        costs = [numbers[name][str(count)] for count in PAPER_COMPONENT_COUNTS]
        right.loglog(PAPER_COMPONENT_COUNTS, costs, ".-", label=name)
    right.set(xlabel=f"components ({max(SAMPLES):,} latents)", ylabel="CPU-seconds per iteration")
    right.set_xticks(PAPER_COMPONENT_COUNTS, labels=[str(count) for count in PAPER_COMPONENT_COUNTS])
    for axes in (left, right):
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path)


def sections(results: Results) -> dict[str, str]:
    """The report as Markdown."""
    numbers = medians(results)
    columns = ["projection", *MIXTURES, "peak_mib"]
    against_samples = ["| latents | " + " | ".join(columns).replace("peak_mib", "peak memory (MiB)") + " |",
                       "|---" * (1 + len(columns)) + "|"]  # fmt: skip
    for samples in SAMPLES:
        cells = [f"{numbers[f'{samples:,} latents'][column]:.4g}" for column in columns]
        against_samples.append(f"| {samples:,} | {' | '.join(cells)} |")
    counts = [str(count) for count in PAPER_COMPONENT_COUNTS]
    against_components = ["| mixture | " + " | ".join(counts) + " |", "|---" * (1 + len(counts)) + "|"]
    for name in MIXTURES:
        against_components.append(f"| {name} | {' | '.join(f'{numbers[name][count]:.3g}' for count in counts)} |")
    whole = numbers[WHOLE]
    iterations = ", ".join(f"{whole[f'iterations of {count}']:.0f}" for count in counts)
    text = (
        f"{WHOLE}: {whole['seconds']:.0f} seconds, {whole['cpu_seconds']:.0f} CPU-seconds, peak memory "
        f"{whole['peak_mib'] / 1024:.2f} GiB; the 16 dimensions explain {whole['explained_variance']:.0%} of the "
        f"variance, and the best starts took {iterations} iterations."
    )
    return {
        "The whole analysis": text,
        f"CPU-seconds of the projection, and of one iteration of {FIXED_COMPONENTS} components": "\n".join(
            against_samples
        ),
        f"CPU-seconds of one iteration against the number of components, {max(SAMPLES):,} latents": "\n".join(
            against_components
        ),
    }


def main(args: list[str] | None = None) -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.analysis", description=__doc__)
    parser.add_argument("--repeats", default=1, type=int)
    parser.add_argument("--output", type=Path, help="write OUTPUT.md, OUTPUT.json and OUTPUT.png")
    options = parser.parse_args(args)
    module = "benchmarks.analysis"
    cases = [Case(f"{samples:,} latents", f"{module}:measure_samples", {"samples": samples}) for samples in SAMPLES]
    cases += [Case(name, f"{module}:measure_components", {"mixture": name}) for name in MIXTURES]
    cases.append(Case(WHOLE, f"{module}:measure_whole", {"threads": 2}))
    results = run_cases(cases, options.repeats)
    write_report(options.output, "Analysis of latents", sections(results), results)
    if options.output is not None:
        draw(results, options.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
