"""Kill runs and continue them, also by another strategy or number of processes, for ``test_resume``."""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback

from callbacks import ResumableCheckpoint
from callbacks.resilience.checkpointing import resolve_checkpoint
from maetok.checkpoints.runs import complete_checkpoints
from tests.support.processes import Group, run_group
from tests.support.strategies.runs import build, fit, held_bytes, optimization, whole_state

STEPS, SAVED, KILLED = 4, 2, 3
KIND = {"single": 1, "ddp": 2, "fsdp": 2, "fsdp-file": 2, "fsdp-async": 2, "fsdp-4": 4, "hsdp-4": 4}


class Journal(Callback):
    """Appends what each micro-batch logged to a file of each process; kills the second process in a step."""

    def __init__(self, folder: Path, kill_in: int) -> None:
        self.folder, self.kill_in = folder, kill_in

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        values = {name: float(value) for name, value in trainer.callback_metrics.items()}
        with (self.folder / f"scalars.{trainer.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps(values | {"step": trainer.global_step}) + "\n")
        last = trainer.global_rank == trainer.world_size - 1
        if pl_module.micro_step == 1 and trainer.global_step + 1 == self.kill_in and last:
            while not complete_checkpoints(self.folder):  # another thread may still write it
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)


def train(
    folder: Path, digits: Path, stage: int, kind: str, steps: int = STEPS, kill_in: int = -1, every: int = SAVED
) -> None:
    """Train from the newest checkpoint of the folder; the first process saves all weights."""
    adam = optimization("AdamW", 1e-3)
    options = (
        {"optimization": adam} if stage == 3 else {"autoencoder_optimization": adam, "discriminator_optimization": adam}
    )
    if stage == 2:
        options["latent_noise"] = 0.1  # noise that differs between processes
    task = build(stage, **options)
    saver = ResumableCheckpoint(every, asynchronous=kind.endswith("async"))
    trainer = fit(
        task, folder, digits, kind, KIND[kind], steps, Journal(folder, kill_in), saver,
        ckpt_path=resolve_checkpoint("last", folder, "fit"),
    )  # fmt: skip
    state, held = whole_state(task), held_bytes(trainer, task)
    if trainer.is_global_zero:
        torch.save((state, held), folder / "result.pt")


def exact(root: Path, digits: Path) -> None:
    """Train each stage by DDP and FSDP twice: uninterrupted, and killed and continued."""
    for stage in (1, 2, 3):
        for kind in ("ddp", "fsdp-async" if stage == 3 else "fsdp"):
            for name, kills in (("whole", (-1,)), ("parts", (KILLED, -1))):
                folder = root / f"{stage}-{kind}-{name}"
                folder.mkdir()
                for kill_in in kills:
                    if kill_in < 0:
                        run_group(KIND[kind], train, folder, digits, stage, kind)
                    else:
                        codes = Group(KIND[kind], train, folder, digits, stage, kind, STEPS, kill_in).join()
                        assert codes[-1] == -signal.SIGKILL, codes


def elsewhere(root: Path, digits: Path) -> None:
    """Train stage 1 by one strategy until the first checkpoint, and continue by another."""
    beginnings = {}
    for kind in ("single", "fsdp", "fsdp-file"):
        beginnings[kind] = root / f"begun-{kind}"
        beginnings[kind].mkdir()
        run_group(KIND[kind], train, beginnings[kind], digits, 1, kind, SAVED)
    pairs = [("fsdp", kind) for kind in ("single", "ddp", "fsdp-4", "hsdp-4")]
    for first, second in [*pairs, ("single", "fsdp"), ("fsdp-file", "single")]:
        folder = root / f"from-{first}-to-{second}"
        shutil.copytree(beginnings[first] / "checkpoints", folder / "checkpoints")
        run_group(KIND[second], train, folder, digits, 1, second)


if __name__ == "__main__":
    exact(Path(sys.argv[1]), Path(sys.argv[2]))
    elsewhere(Path(sys.argv[1]), Path(sys.argv[2]))
