"""Pack images into shards: ``python -m datamodules.pack --source FOLDER|digits|TARS --output FOLDER``."""

import argparse
import os
import re
from pathlib import Path

from datamodules.pack.digits import pack_digits
from datamodules.pack.sources import folder_source, tar_source
from datamodules.pack.split import PackOptions, pack_split


def main(args: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m datamodules.pack", description=__doc__)
    parser.add_argument(
        "--source",
        required=True,
        help="image folder with one sub-folder per class, tar files ('tars/*.tar'), or: digits",
    )
    parser.add_argument("--output", required=True, type=Path, help="folder for the shards")
    parser.add_argument("--split", default="train", help="first part of the file names (digits: both splits)")
    parser.add_argument("--samples-per-shard", default=1000, type=int)
    parser.add_argument("--resize", type=int, help="shrink the short side to this many pixels if it is longer")
    parser.add_argument("--verify", default=True, action=argparse.BooleanOptionalAction, help="decode every image once")
    parser.add_argument(
        "--max-fault-rate",
        default=0.001,
        type=float,
        help="share of broken samples above which packing fails",
    )
    parser.add_argument("--seed", default=0, type=int, help="seed of the order in which samples are stored")
    parser.add_argument("--jobs", default=len(os.sched_getaffinity(0)), type=int, help="processes")
    parser.add_argument("--overwrite", action="store_true", help="replace other shards of this split")
    given = parser.parse_args(args)
    check_arguments(parser, given)
    options = PackOptions(given.samples_per_shard, given.resize, given.verify, given.max_fault_rate, given.seed)
    if given.source == "digits":
        pack_digits(given.output, given.samples_per_shard, given.overwrite)
    else:
        source = tar_source(given.source) if given.source.endswith(".tar") else folder_source(Path(given.source))
        pack_split(source, given.output, given.split, options, given.jobs, given.overwrite)
    print(f"shards in {given.output}:", *sorted(path.name for path in given.output.glob("*.tar")))


def check_arguments(parser: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    """Exit with a usage error for an impossible number or name."""
    for name, low in (("samples_per_shard", 1), ("resize", 1), ("jobs", 0)):
        value = getattr(given, name)
        if value is not None and value < low:
            parser.error(f"--{name.replace('_', '-')} {value} must be at least {low}")
    if not 0 <= given.max_fault_rate <= 1:
        parser.error(f"--max-fault-rate {given.max_fault_rate} is a share and must lie in [0, 1]")
    if not re.fullmatch(r"\w[\w.-]*", given.split):
        parser.error(f"--split {given.split!r} begins file names: use letters, digits, '-', '_' and '.'")


if __name__ == "__main__":
    main()
