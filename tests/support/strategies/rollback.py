"""Train with a rollback to an older checkpoint: on one process, by DDP and sharded, for ``test_rollback``."""

import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback

from callbacks import NonFiniteGuard, ResumableCheckpoint
from callbacks.resilience.checkpointing import resolve_checkpoint
from maetok.checkpoints.files import on_host
from strategies.fsdp import gathered
from tests.support.helpers import Poison
from tests.support.processes import run_group
from tests.support.strategies.resume import KIND
from tests.support.strategies.runs import build, fit, optimization, whole_state

STEPS, SAVED, BACK = 7, 2, 5
BAD = [3, 4]  # steps 4 and 5; the newest earlier checkpoint is step 2, and step 4 is saved too


class Whole(Callback):
    """Records the whole state of task and optimizers before the first step after the rollback."""

    state: Any = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == BACK:
            optimizers = gathered([optimizer.state_dict() for optimizer in trainer.optimizers])
            self.state = whole_state(pl_module), on_host(optimizers)


def train(folder: Path, digits: Path, kind: str) -> None:
    """Train from the newest checkpoint; every process saves its state after the rollback and at the end."""
    adam, last = optimization("AdamW", 1e-3), KIND[kind] - 1
    task = build(1, autoencoder_optimization=adam, discriminator_optimization=adam, accumulate_grad_batches=1)
    guard, whole = NonFiniteGuard(max_in_a_row=2, check_every_n_steps=BACK, rollbacks=1), Whole()
    saver = ResumableCheckpoint(SAVED, keep_last=-1, asynchronous=kind.endswith("async"))
    trainer = fit(
        task, folder, digits, kind, KIND[kind], STEPS, Poison(BAD, last), guard, whole, saver,
        ckpt_path=resolve_checkpoint("last", folder, "fit"),
    )  # fmt: skip
    rates = [optimizer.param_groups[0]["lr"] for optimizer in trainer.optimizers]
    result = whole.state, whole_state(task), guard.rollback.spans, rates
    torch.save(result, folder / f"{trainer.global_rank}.pt")


def main(root: Path, digits: Path) -> None:
    """Run from the beginning, and twice from one sharded checkpoint: before and after the rollback."""
    for kind in ("single", "ddp", "fsdp-async"):
        (root / kind).mkdir()
        run_group(KIND[kind], train, root / kind, digits, kind)
    for name, step, kind in (("from-folder", SAVED, "single"), ("continued", 6, "fsdp-async")):
        left = Path("checkpoints") / f"step={step:09d}.ckpt"
        shutil.copytree(root / "fsdp-async" / left, root / name / left)
        run_group(KIND[kind], train, root / name, digits, kind)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
