"""Plots of ``python -m benchmarks``: ratios to the reference, and growth."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from benchmarks.harness import Numbers
from benchmarks.speed.report import Target, variants_of


def plot_ratios(results: Mapping[str, Numbers], targets: Mapping[str, Target | None], path: Path) -> None:
    """Plot a bar for each variant: how many times faster than the reference, with its spread and the target."""
    from matplotlib.figure import Figure

    bars = [
        (f"{case} ({variant})" if variant != "suite" else case, numbers, variant, targets[case])
        for case, numbers in results.items()
        for variant in variants_of(numbers)
        if f"{variant} ratio" in numbers
    ]
    figure = Figure(figsize=(9, 0.32 * len(bars) + 1), layout="constrained")
    axes = figure.add_subplot()
    places = np.arange(len(bars))[::-1]
    ratios = np.array([numbers[f"{variant} ratio"] for _, numbers, variant, _ in bars])
    low = ratios - [numbers[f"{variant} ratio min"] for _, numbers, variant, _ in bars]
    high = [numbers[f"{variant} ratio max"] for _, numbers, variant, _ in bars] - ratios
    axes.barh(places, ratios, xerr=[low, high], color="steelblue", ecolor="black", capsize=2)
    for place, (_, _, variant, target) in zip(places, bars, strict=True):
        if target is not None and target.variant == variant:
            axes.plot([target.ratio] * 2, [place - 0.45, place + 0.45], color="darkorange", linewidth=2)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.margins(y=0.01)
    axes.set_yticks(places, [name for name, *_ in bars], fontsize=8)
    axes.set_xlabel("times faster than the plain version (orange: target)")
    figure.savefig(path, dpi=110)


def plot_growth(results: Mapping[str, Numbers], path: Path) -> None:
    """Plot CPU-seconds over the growing number in logarithmic axes, with the fitted exponents."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(results), 3.5), layout="constrained")
    for place, (name, numbers) in enumerate(results.items(), start=1):
        axes = figure.add_subplot(1, len(results), place)
        sizes = [int(key.removeprefix("seconds ")) for key in numbers if key.startswith("seconds ")]
        axes.loglog(sizes, [numbers[f"seconds {size}"] for size in sizes], "o-", color="steelblue")
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        axes.set_title(f"{name}\nexponent {numbers['exponent of seconds']:.2f}", fontsize=10)
        axes.set_ylabel("CPU-seconds")
    figure.savefig(path, dpi=110)
