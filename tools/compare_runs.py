"""A table that compares the metrics of several runs: ``python -m tools.compare_runs runs/a runs/b``."""

import json
import sys
from pathlib import Path

ROWS = {
    "validation/psnr": ("PSNR (dB)", "{:.2f}"),
    "validation/ssim": ("SSIM", "{:.3f}"),
    "validation/l1": ("L1", "{:.4f}"),
    "validation/reconstruction_fd": ("FD", "{:.2f}"),
    "validation/linear_probe": ("linear probe", "{:.1%}"),
    "step": ("steps", "{:.0f}"),
    "minutes": ("minutes", "{:.1f}"),
}


def last_record(run: Path) -> dict[str, float]:
    """Return the last record of a run's ``metrics.jsonl``; raise FileNotFoundError if the run has not validated yet."""
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])


def table(runs: list[Path]) -> str:
    """Return a text table with a row per metric and a column per run."""
    records = [last_record(run) for run in runs]
    width = max(len(run.name) for run in runs) + 2
    lines = [" " * 14 + "".join(f"{run.name:>{width}}" for run in runs)]
    for key, (title, form) in ROWS.items():
        cells = [form.format(record[key]) if key in record else "-" for record in records]
        lines.append(f"{title:<14}" + "".join(f"{cell:>{width}}" for cell in cells))
    return "\n".join(lines)


def main(args: list[str] | None = None) -> None:
    """Print the places of logs and pictures, and the table."""
    runs = [Path(argument) for argument in (sys.argv[1:] if args is None else args)]
    print("\nTensorBoard: tensorboard --logdir", runs[0].parent)
    for run in runs:
        pictures = sorted((run / "pictures").glob("*.png"))
        print(f"pictures of {run.name}:", pictures[-1] if pictures else "none")
    print("\n" + table(runs))


if __name__ == "__main__":
    main()
