"""Compare two runs of the same benchmarks: do they agree within their spreads?"""

import json
from collections.abc import Mapping
from pathlib import Path

from benchmarks.harness import Numbers
from benchmarks.speed.report import join_lines, spread_of, variants_of


def read_runs(paths: tuple[Path, Path]) -> tuple[dict[str, Numbers], dict[str, Numbers]]:
    """Return the cases with ratios that two ``OUTPUT.json`` share."""
    first, second = (
        {name: repeats[0] for name, repeats in json.loads(path.read_text())["repeats"].items()} for path in paths
    )
    names = [name for name in first if name in second and any(key.endswith(" ratio") for key in first[name])]
    return {name: first[name] for name in names}, {name: second[name] for name in names}


def disagreement(first: Numbers, second: Numbers, name: str) -> float:
    """Return the gap between the ranges of two runs, relative to the median of the first; 0 if they overlap."""
    gap = max(first[f"{name} min"] - second[f"{name} max"], second[f"{name} min"] - first[f"{name} max"])
    return max(gap, 0.0) / first[name]


def consecutive_section(first: Mapping[str, Numbers], second: Mapping[str, Numbers]) -> str:
    """Return both runs' ratios side by side, and a verdict."""
    lines = ["| case | variant | first run: median (min ... max) | second run |", "|---|---|---|---|"]
    apart, changes = {}, []
    for case, numbers in first.items():
        for variant in variants_of(numbers):
            name = f"{variant} ratio"
            if name in numbers:
                spreads = [spread_of(run, name, 1, ".2f") for run in (numbers, second[case])]
                lines.append(f"| {case} | {variant} | {' | '.join(spreads)} |")
                changes.append(abs(second[case][name] / numbers[name] - 1))
                if gap := disagreement(numbers, second[case], name):
                    apart[f"{case}, {variant}"] = gap
    verdict = (
        f"The medians of {len(changes)} ratios differ by {100 * max(changes):.1f} % at most, "
        f"and the ranges of the rounds overlap for {len(changes) - len(apart)} of them."
    )
    verdict += "".join(f" {name}: {100 * gap:.1f} % apart." for name, gap in apart.items())
    return f"{verdict}\n\n{join_lines(lines)}"
