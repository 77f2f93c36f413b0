"""Run ``main.py fit`` of all stages on two processes, with and without the meta device, for ``test_meta_device``."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback

from main import main
from tests.support.helpers import EXPERIMENTS, TINY
from tests.support.processes import run_group

STEPS, SAVED = 2, 1  # the discriminator is active in the second step
EXPERIMENT = {1: "imagenet256_maetok_b128", 2: "imagenet256_decoder", 3: "imagenet256_sit_xl"}
OVERLAY = {1: "tiny", 2: "tiny_decoder", 3: "tiny_diffusion"}
ROOTS = {1: ("model", "ema"), 2: ("model", "ema"), 3: ("denoiser", "emas")}


class RecordDevices(Callback):
    """Records before sharding which devices hold the trained network with its averages, and all other networks."""

    def __init__(self, stage: int) -> None:
        self.roots = ROOTS[stage]

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        found: dict[str, list[str]] = {"trained": [], "others": []}
        for name, tensor in pl_module.state_dict().items():
            found["trained" if name.split(".")[0] in self.roots else "others"].append(tensor.device.type)
        text = json.dumps({kind: sorted(set(devices)) for kind, devices in found.items()})
        (Path(trainer.default_root_dir) / f"devices.{trainer.global_rank}.json").write_text(text)


def train(folder: Path, digits: Path, stage: int, meta_device: bool, *arguments: str) -> None:
    """Run one process of the command line."""
    overlays = [f"--config={TINY.with_name(name)}.yaml" for name in (OVERLAY[stage], "fsdp")]
    recorder = [
        "--trainer.callbacks+=tests.support.strategies.meta_device.RecordDevices",
        f"--trainer.callbacks.stage={stage}",
    ]
    main([
        "fit", f"--config={EXPERIMENTS / EXPERIMENT[stage]}.yaml", *overlays, *recorder, "--trainer.devices=2",
        f"--trainer.max_steps={STEPS}", f"--trainer.strategy.init_args.meta_device={str(meta_device).lower()}",
        f"--trainer.default_root_dir={folder}", f"--data.init_args.root={digits}", *arguments,
        "--trainer.enable_model_summary=false", "--trainer.limit_val_batches=0",
    ])  # fmt: skip


def runs(root: Path, digits: Path) -> None:
    """Run each stage both ways from the previous stage, with random frozen networks; continue one run from a step."""

    def run(name: str, stage: int, meta_device: bool, *arguments: str) -> None:
        (root / name).mkdir(exist_ok=True)
        run_group(2, train, root / name, digits, stage, meta_device, *arguments)

    for stage in (1, 2, 3):
        source = [f"--model.init_args.init_from.path={root / f'{stage - 1}-meta'}"] if stage > 1 else []
        run(f"{stage}-whole", stage, False, *source)
        run(f"{stage}-meta", stage, True, *source)
    guided = f"--model.init_args.guide_from.path={root / '3-whole'}"
    step = f"checkpoints/step={SAVED:09d}.ckpt"
    shutil.copytree(root / "3-whole" / step, root / "3-continued" / step)
    run("3-continued", 3, True, source[0], guided, "--ckpt_path=last")


if __name__ == "__main__":
    runs(Path(sys.argv[1]), Path(sys.argv[2]))
