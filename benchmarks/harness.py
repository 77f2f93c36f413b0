"""Run named cases in fresh processes, repeat after repeat, and compare the medians as ratios.

A case is a function that measures something and returns numbers. Every repeat of every case runs in its own process, so
peak memory and CPU time belong to the case alone. The repeats of all cases are interleaved, so a change in the load
of the machine affects all of them. Each process uses one thread.

CPU time is user + system time of the process and its live loader workers. It is read from /proc after the first batches
(imports, start-up, the index and the filling of the queues are over) and again after the last measured batch. At both
moments the workers are equally far ahead, so each batch counts once and the prefetched ones do not count.
"""

import importlib
import itertools
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from maetok.runtime.memory import process_memory

Numbers = dict[str, float]
Results = dict[str, list[Numbers]]
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
MEBIBYTE = 2**20


@dataclass(frozen=True)
class Case:
    """A measurement with a name.

    Args:
        name: name in the table.
        function: ``module:function`` that returns numbers by name.
        arguments: keyword arguments for the function, as JSON values.
    """

    name: str
    function: str
    arguments: dict[str, Any] = field(default_factory=dict)


def run_cases(cases: Sequence[Case], repeats: int) -> Results:
    """Return the numbers of each repeat of each case; rotate the order of the cases from repeat to repeat."""
    results: Results = {case.name: [] for case in cases}
    for repeat in range(repeats):
        first = repeat % len(cases)
        for case in [*cases[first:], *cases[:first]]:
            numbers = run_case(case)
            results[case.name].append(numbers)
            print(f"repeat {repeat + 1}: {case.name}: {short(numbers)}", file=sys.stderr, flush=True)
    return results


def run_case(case: Case) -> Numbers:
    """Return the numbers of one case from a fresh process.

    Raises:
        RuntimeError: if the process fails; its output is printed first.
    """
    command = [sys.executable, "-m", "benchmarks.harness", json.dumps(asdict(case))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    process = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if process.returncode:
        print(process.stdout, file=sys.stderr)
        raise RuntimeError(f"case {case.name!r} ended with status {process.returncode}")
    numbers: Numbers = json.loads(process.stdout.splitlines()[-1])
    return numbers


def measure_batches(
    batches: Iterable[Any], batch_size: int, warm_up: int, measured: int, count_children: bool = True
) -> Numbers:
    """Take ``warm_up`` batches, then measure the next ``measured``; the loader must yield more than these.

    Without ``count_children``, measure the main process only.

    Returns:
        samples per CPU-second and per second, CPU-seconds, seconds, and peak memory (MiB) of the main process
        and of the largest worker.
    """
    iterator = iter(batches)
    skip(iterator, warm_up)
    workers = [process.pid for process in multiprocessing.active_children() if process.pid and count_children]
    before, started = {pid: cpu_seconds(pid) for pid in [os.getpid(), *workers]}, time.perf_counter()
    skip(iterator, measured)
    seconds = time.perf_counter() - started
    after = {pid: cpu_seconds(pid) for pid in before}
    cpu = sum(after.values()) - sum(before.values())
    return {
        "samples_per_cpu_second": batch_size * measured / cpu,
        "samples_per_second": batch_size * measured / seconds,
        "cpu_seconds": cpu,
        "main_cpu_seconds": after[os.getpid()] - before[os.getpid()],
        "seconds": seconds,
        "peak_main_mib": peak_memory(os.getpid()),
        "peak_worker_mib": max((peak_memory(pid) for pid in workers), default=0.0),
        "workers": len(workers),
    }


def skip(iterator: Iterator[Any], count: int) -> None:
    """Take ``count`` batches and drop them.

    Raises:
        RuntimeError: if there are fewer.
    """
    taken = sum(1 for _ in itertools.islice(iterator, count))
    if taken < count:
        raise RuntimeError(f"the loader ended after {taken} of {count} batches: measure fewer batches")


def cpu_seconds(pid: int) -> float:
    """Return user and system seconds of a live process, summed over its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / CLOCK_TICKS


def peak_memory(pid: int) -> float:
    """Return the largest resident memory of a live process so far, in MiB."""
    peak = process_memory("VmHWM", pid)
    if peak is None:
        raise RuntimeError(f"/proc/{pid}/status has no VmHWM: run the benchmark on Linux")
    return peak / MEBIBYTE


def medians(results: Results) -> dict[str, Numbers]:
    """Return the median over the repeats of each number of each case."""
    return {
        name: {key: statistics.median(numbers[key] for numbers in repeats) for key in repeats[0]}
        for name, repeats in results.items()
    }


def table(results: Results, key: str, reference: str) -> str:
    """Return Markdown: each case's median of ``key``, smallest and largest value, and ratio to the reference case.

    A ratio is the median over the repeats of the quotient within one repeat, with the smallest and largest quotient.
    """
    lines = [
        f"| case | {key.replace('_', ' ')}: median (min ... max) | ratio to {reference}: median (min ... max) |",
        "|---|---|---|",
    ]
    for name, repeats in results.items():
        values = [numbers[key] for numbers in repeats]
        base = [numbers[key] for numbers in results[reference]]
        ratios = [value / other for value, other in zip(values, base, strict=True)]
        lines.append(f"| {name} | {spread(values, '.4g')} | {spread(ratios, '.2f')} |")
    return "\n".join(lines)


def spread(values: Sequence[float], form: str) -> str:
    """Return ``median (min ... max)``."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} ... {max(values):{form}})"


def short(numbers: Numbers) -> str:
    """Return the numbers on one line."""
    return ", ".join(f"{key} {value:.4g}" for key, value in numbers.items())


def write_report(output: Path | None, title: str, sections: dict[str, str], results: Results) -> None:
    """Print the sections as Markdown; with ``output`` also write them as ``.md`` and all numbers as ``.json``."""
    text = "\n\n".join([f"# {title}", *(f"## {name}\n\n{body}" for name, body in sections.items())]) + "\n"
    print(text)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.with_suffix(".md").write_text(text)
        everything = {"title": title, "cpus": os.cpu_count(), "medians": medians(results), "repeats": results}
        output.with_suffix(".json").write_text(json.dumps(everything, indent=1) + "\n")


def main() -> None:
    """Run the one case that the argument describes and print its numbers as the last line."""
    import torch

    torch.set_num_threads(1)
    case = Case(**json.loads(sys.argv[1]))
    module, _, function = case.function.partition(":")
    print(json.dumps(getattr(importlib.import_module(module), function)(**case.arguments)), flush=True)
    for process in multiprocessing.active_children():  # they would keep reading beside the next case
        process.kill()
        process.join()
    os._exit(0)


if __name__ == "__main__":
    main()
