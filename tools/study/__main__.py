"""The study and its document: ``python -m tools.study``; see :mod:`tools.study.runs`."""

import argparse
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tools.study.runs import PROFILES, STUDIED, VARIANTS, Cell


def train(root: Path, seeds: int, variants: list[str], jobs: int) -> list[Cell]:
    """Run the missing commands, ``jobs`` cells at a time, and return all cells."""
    from datamodules.pack.digits import pack_digits

    digits = Path("data/digits")
    if not list(digits.glob("validation-*.tar")):
        pack_digits(digits)
    cells = [Cell(root, variant, seed) for seed in range(seeds) for variant in variants]
    threads = max(1, (os.cpu_count() or 1) // jobs)

    def train_cell(cell: Cell) -> None:
        for run in cell.runs():
            run.execute(threads)

    with ThreadPoolExecutor(jobs) as pool:
        for finished in [pool.submit(train_cell, cell) for cell in cells]:
            finished.result()
    return cells


def main(args: list[str] | None = None) -> None:
    """Run the study, measure it and write the document."""
    parser = argparse.ArgumentParser(prog="python -m tools.study", description=__doc__)
    parser.add_argument("--profile", default="quick", choices=list(PROFILES))
    parser.add_argument("--variants", nargs="+", default=STUDIED, choices=list(VARIANTS))
    parser.add_argument("--jobs", default=os.cpu_count() or 1, type=int, help="number of tokenizers to train at a time")
    parser.add_argument("--runs", default=Path("runs/study"), type=Path)
    parser.add_argument("--output", default=Path("docs/study.md"), type=Path, help="document that receives the results")
    options = parser.parse_args(args)
    cells = train(options.runs, PROFILES[options.profile], options.variants, options.jobs)
    from tools.study import mixtures, report
    from tools.study.measures import measured

    report.write(measured(cells), options.output)
    mixtures.main(["--output", str(options.output.with_name("study_mixtures"))])


if __name__ == "__main__":
    main()
