"""``python -m maetok.checkpoints.consolidate --ckpt FOLDER --output FILE``: a sharded checkpoint as one file.

Training can continue from either, on any number of processes, and ``python -m maetok.hub export`` reads either.
torch's ``dcp_to_torch_save`` is not enough: it reads tensors alone, and counters and data position lie in ``rest.pt``.
"""

import argparse
from pathlib import Path

from maetok.checkpoints.files import read_checkpoint, write_file
from maetok.checkpoints.runs import locate_checkpoint


def consolidate(ckpt: str | Path, output: str | Path) -> Path:
    """Write the whole of a checkpoint to one file; optimizers and counters are in it.

    Args:
        ckpt: a checkpoint, or the directory of a run for its newest one.
        output: the file; must not exist.

    Returns:
        The checkpoint that was read.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        FileExistsError: if the output exists.
    """
    source, output = locate_checkpoint(Path(ckpt)), Path(output)
    if output.exists():
        raise FileExistsError(f"--output={output} exists already: give another name, or remove it")
    write_file(read_checkpoint(source), output)
    return source


def main(args: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m maetok.checkpoints.consolidate", description="One file of a checkpoint."
    )
    parser.add_argument("--ckpt", required=True, type=Path, help="checkpoint, or run directory for its newest one")
    parser.add_argument("--output", required=True, type=Path, help="file to write")
    given = parser.parse_args(args)
    source = consolidate(given.ckpt, given.output)
    print(f"wrote {given.output} ({given.output.stat().st_size / 2**20:.1f} MiB) from {source}")


if __name__ == "__main__":
    main()
