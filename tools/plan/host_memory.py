"""Host memory of two processes at the start of a sharded training of stage 3, with and without the meta device.

``python -m tools.plan.host_memory --config configs/experiment/imagenet256_sit_l.yaml`` runs the real command line, with
a random tokenizer and no data, until networks are sharded and optimizers built. It prints a table.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback

from maetok.runtime.memory import process_memory

OVERLAY = "configs/overlay/fsdp.yaml"
DATA = "lightning.pytorch.demos.boring_classes.BoringDataModule"  # training ends before the first batch
GIBIBYTE = 2**30


class ReportMemory(Callback):
    """Writes the current and peak memory of a process at the start of ``fit``, and ends the process."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Note the memory before sharding."""
        self.built = process_memory("VmRSS")

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Write the memory after networks are sharded and optimizers built."""
        numbers = {"built": self.built, "sharded": process_memory("VmRSS"), "peak": process_memory("VmHWM")}
        (Path(trainer.default_root_dir) / f"{trainer.global_rank}.json").write_text(json.dumps(numbers))
        dist.barrier()
        os._exit(0)


def measure(config: Path, meta_device: bool) -> list[dict[str, int]]:
    """Return the bytes of the first and second process; raise CalledProcessError if the command line fails."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "main.py", "fit", f"--config={config}", f"--config={OVERLAY}", f"--data={DATA}"]
        command += ["--model.init_args.init_from=null", "--trainer.accelerator=cpu", "--trainer.devices=2"]
        command += ["--trainer.callbacks=tools.plan.host_memory.ReportMemory", f"--trainer.default_root_dir={folder}"]
        command += [f"--trainer.strategy.init_args.meta_device={str(meta_device).lower()}", "--trainer.logger=false"]
        command += ["--trainer.enable_model_summary=false", "--trainer.precision=32-true"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": "."})
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in (0, 1)]


def main(args: list[str] | None = None) -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(prog="python -m tools.plan.host_memory", description="Host memory at start-up.")
    parser.add_argument("--config", required=True, type=Path, help="experiment that trains a denoiser")
    config = parser.parse_args(args).config
    print("| meta_device | process | built, GiB | sharded, GiB | peak, GiB |\n|---|---|---|---|---|")
    for meta_device in (False, True):
        for rank, numbers in enumerate(measure(config, meta_device)):
            cells = [f"{numbers[name] / GIBIBYTE:.2f}" for name in ("built", "sharded", "peak")]
            print(f"| {str(meta_device).lower()} | {rank} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
