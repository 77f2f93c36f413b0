"""Time of the suite beside a plain version of the same networks: ``python -m benchmarks [--full]``.

Everything runs on one thread of a CPU, in CPU-seconds. Variants of a case take turns; ratios are within a round.
"""

import argparse
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from benchmarks.harness import Case, Numbers, Results, run_case, short, table, write_report
from benchmarks.speed import report
from benchmarks.speed.consecutive import consecutive_section, read_runs
from benchmarks.speed.plots import plot_growth, plot_ratios

STILL_SLOW = Path(__file__).with_name("still_slow.md")
METHOD = (
    "Everything runs on one thread; times are CPU-seconds. Each round runs all variants of a case once, so a ratio "
    "compares neighbours in time. The tables give median, smallest and largest value. The reference is "
    "`benchmarks/speed/reference.py`: the same networks and weights, written plainly and run with PyTorch's default "
    "settings; its outputs are equal within 1e-5 (`tests/benchmarks/test_reference.py`). The limit is the rate of one "
    "large matrix product of the same dtype in the same rounds. torch counts FLOPs, including attention."
)


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--full", action="store_true", help="all cases, about an hour; otherwise a few minutes")
    parser.add_argument("--rounds", default=5, type=int, help="rounds of each case; fewer of the longest")
    parser.add_argument("--only", default="", help="run only cases whose name contains this")
    parser.add_argument("--folder", default=Path("runs/bench"), type=Path, help="where data that is read is kept")
    parser.add_argument(
        "--output", default=Path("runs/bench/performance"), type=Path, help="write OUTPUT.md, .json, plots"
    )
    parser.add_argument("--numbers", type=Path, help="OUTPUT.json of an earlier run, whose cases are not run again")
    parser.add_argument(
        "--consecutive", nargs=2, type=Path, metavar="JSON", help="two runs whose ratios to compare in a section"
    )
    options = parser.parse_args(args)
    options.known = json.loads(options.numbers.read_text())["repeats"] if options.numbers else {}
    chosen = [
        it for it in report.comparisons() if (it.full if options.full else it.quick) and options.only in it.case.name
    ]
    networks = {it.case.name: run(it.case, options, min(options.rounds, it.most_rounds)) for it in chosen}
    results: Results = {name: [numbers] for name, numbers in networks.items()}
    sections = {"How it was measured": description(options.rounds)}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    if networks:
        targets = {it.case.name: it.target for it in chosen}
        sections |= network_sections(networks, targets, options.output)
    for title, part in PARTS.items():
        text, found = part(options)
        if found:
            sections[title] = text
            results |= {name: [numbers] for name, numbers in found.items()}
    text, read = reading(options)
    if read:
        sections["Reading"], results = text, results | read
    if options.consecutive:
        sections["Two consecutive runs"] = consecutive_section(*read_runs(options.consecutive))
    sections["Still slow, and why"] = STILL_SLOW.read_text()
    write_report(options.output, "Performance", sections, results)


def run(case: Case, options: argparse.Namespace, rounds: int | None = None) -> Numbers:
    """Run a case in a fresh process, unless its numbers are known; ``rounds`` overrides its number of rounds."""
    if case.name in options.known:
        return options.known[case.name][0]
    arguments = case.arguments if rounds is None else {**case.arguments, "rounds": rounds}
    numbers = run_case(Case(case.name, case.function, arguments))
    shown = {key: value for key, value in numbers.items() if not key.endswith((" min", " max"))}
    print(f"{case.name}: {short(shown)}", flush=True)
    return numbers


def description(rounds: int) -> str:
    """Describe the machine and the method, for the head of the report."""
    model = next(
        (line.split(":")[1].strip() for line in cpu_lines() if line.startswith("model name")), platform.machine()
    )
    instructions = "AMX" if torch.cpu._is_amx_tile_supported() else "AVX-512 bfloat16"
    has = instructions if torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported() else "neither"
    return f"{model} ({has}), torch {torch.__version__}. {rounds} rounds, fewer of the longest cases. {METHOD}"


def cpu_lines() -> list[str]:
    """Return the lines of ``/proc/cpuinfo``, or none where it does not exist."""
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def network_sections(
    networks: Mapping[str, Numbers], targets: Mapping[str, report.Target | None], output: Path
) -> dict[str, str]:
    """Plot, table and missed targets."""
    plot = output.with_name(output.name + "_ratios.png")
    plot_ratios(networks, targets, plot)
    rows = report.join_lines(report.comparison_rows(networks, targets))
    found = report.missed(networks, targets)
    verdict = "\n".join(f"- {line}" for line in found) if found else "All were reached."
    sections = {"Networks": f"![ratios]({plot.name})\n\n{rows}", "Targets that were not reached": verdict}
    if tokens := report.token_rows(networks):
        sections["Few tokens against many"] = report.join_lines(tokens)
    peaks = [
        f"| {name} | {numbers['peak MiB']:.0f} | {numbers['limit'] / 1e9:.0f} |" for name, numbers in networks.items()
    ]
    head = ["| case | peak memory of its process, MiB | limit, GFLOP/s |", "|---|---|---|"]
    return sections | {"Memory, and the rate of matrix products": report.join_lines([*head, *peaks])}


def surrounding(options: argparse.Namespace) -> tuple[str, dict[str, Numbers]]:
    """Measure optimizer, average, checkpoints and start-up."""
    found = {
        name: run(Case(name, function), options, options.rounds)
        for name, function in report.surroundings(options.full).items()
        if options.only in name
    }
    lines = ["| case | variant | CPU-ms: median (min ... max) |", "|---|---|---|"]
    for name, numbers in found.items():
        for variant in report.variants_of(numbers):
            lines.append(f"| {name} | {variant} | {report.spread_of(numbers, f'{variant} seconds', 1000, '.0f')} |")
    return report.join_lines(lines), found


def growth(options: argparse.Namespace) -> tuple[str, dict[str, Numbers]]:
    """Measure exponents of growth, and plot them."""
    found = {
        name: run(Case(name, function), options, options.rounds)
        for name, function in report.GROWTH.items()
        if options.only in name and options.full
    }
    if not found:
        return "", {}
    plot = options.output.with_name(options.output.name + "_growth.png")
    plot_growth(found, plot)
    lines = ["| case | exponent of time | exponent of FLOPs |", "|---|---|---|"]
    for name, numbers in found.items():
        lines.append(f"| {name} | {numbers['exponent of seconds']:.2f} | {numbers['exponent of FLOPs']:.2f} |")
    return f"![growth]({plot.name})\n\n{report.join_lines(lines)}", found


def operators(options: argparse.Namespace) -> tuple[str, dict[str, Numbers]]:
    """Measure the shares of operators in the training step."""
    found = {}
    for precision in ("float32", "bfloat16"):
        name = f"operators of the tokenizer step, {precision}"
        if options.full and options.only in name:
            arguments = {"precision": precision, "images": 4, "compiled": True}
            found[name] = run(Case(name, "benchmarks.speed.operators:step_operators", arguments), options)
    if not found:
        return "", {}
    kinds = next(iter(found.values()))
    lines = [f"| share of the CPU time | {' | '.join(found)} |", "|---" * (1 + len(found)) + "|"]
    lines += [f"| {kind} | {' | '.join(f'{numbers[kind]:.3f}' for numbers in found.values())} |" for kind in kinds]
    return report.join_lines(lines), found


def reading(options: argparse.Namespace) -> tuple[str, Results]:
    """Measure images and latents per CPU-second."""
    from benchmarks.harness import run_cases
    from benchmarks.speed.system import reading_cases

    if options.only and options.only not in "reading":
        return "", {}
    repeats = options.rounds if options.full else 2
    tables, everything = [], Results()
    for kind, cases in reading_cases(options.folder, 20, 2000).items():
        known = {case.name: options.known[case.name] for case in cases if case.name in options.known}
        results = known if len(known) == len(cases) else run_cases(cases, repeats)
        reference = next(case.name for case in cases if not case.name.startswith(("suite", "bare")))
        tables.append(f"### {kind}\n\n{table(results, 'samples_per_cpu_second', reference)}")
        everything |= results
    return "\n\n".join(tables), everything


def overhead(options: argparse.Namespace) -> tuple[str, dict[str, Numbers]]:
    """Measure the share of a training step that logging, average, gradient norm and callbacks take."""
    name = "overhead of a step"
    if not options.full or options.only not in name:
        return "", {}
    numbers = run(Case(name, "benchmarks.speed.overhead:measure_overhead"), options)
    shares = [
        f"| {key.removesuffix('_share')} | {100 * value:.2f} % |" for key, value in numbers.items() if "share" in key
    ]
    head = ["| part of a step of MAETok-B, batch 4, float32 | share of its CPU time |", "|---|---|"]
    return report.join_lines([*head, *shares]), {name: numbers}


PARTS = {
    "Around the networks": surrounding,
    "Overhead in a training step": overhead,
    "Growth": growth,
    "Operators": operators,
}


if __name__ == "__main__":
    main()
