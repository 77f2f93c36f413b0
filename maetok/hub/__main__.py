"""Published models on the command line: ``python -m maetok.hub export --ckpt runs/E --output FOLDER``."""

import argparse
from pathlib import Path


def main(args: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m maetok.hub", description="Published models.")
    command = parser.add_subparsers(dest="command", required=True).add_parser(
        "export", help="make a published folder of a run: its tokenizer, or its SiT and the statistics of the latents"
    )
    command.add_argument("--ckpt", required=True, type=Path, help="checkpoint, or run directory for its newest one")
    command.add_argument("--output", required=True, type=Path, help="folder for the model")
    command.add_argument("--config", type=Path, help="config of the run (default: config.yaml of the run directory)")
    command.add_argument(
        "--weights", choices=("ema", "raw"), default="ema", help="moving average (default) or the weights as trained"
    )
    given = parser.parse_args(args)
    from maetok.hub.export import export

    network = export(given.ckpt, given.output, given.config, given.weights)
    print(f"wrote {type(network).__name__} ({given.weights} weights) to {given.output}")


if __name__ == "__main__":
    main()
