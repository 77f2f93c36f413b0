"""Between log steps training reads no number from a tensor: on a GPU each read would wait for the step to end."""

import json
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.helpers import run

CALLBACKS: list[dict[str, Any]] = [
    {"class_path": "tests.lightning_modules.test_waiting.CountReads"},  # first, so that it encloses the count of FLOPs
    {"class_path": "callbacks.StepProgressBar", "init_args": {"refresh_rate": 5}},
    {"class_path": "callbacks.Throughput", "init_args": {"peak_flops_per_second": 1e11}},
    {"class_path": "callbacks.NonFiniteGuard"},
    {"class_path": "callbacks.ResumableCheckpoint", "init_args": {"every_n_steps": 100}},
]
READ = torch.ops.aten._local_scalar_dense  # item(), float(), int() and bool() of a tensor call this


class Reads(TorchDispatchMode):
    """Counts the numbers that are read from tensors."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket is READ
        return func(*args, **(kwargs or {}))


class CountReads(Callback):
    """Counts reads in each step, including those of callbacks, loggers and the training loop before the next step."""

    per_step: ClassVar[list[int]]

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.close()
        self.mode = Reads()
        self.mode.__enter__()

    def close(self) -> None:
        mode = self.__dict__.pop("mode", None)
        if mode is not None:
            mode.__exit__(None, None, None)
            CountReads.per_step.append(mode.count)

    def on_train_end(self, *_: Any) -> None:
        self.close()


def test_steps_read_no_numbers(tmp_path: Path, digits_root: Path) -> None:
    """Run all losses, discriminator, guard and progress bar. Three reads are of numbers that are always on the CPU.

    They are the position of the next batch, twice before it is brought to the device, and whether there was a signal.
    The last of the five steps logs; the first ones count FLOPs.
    """
    CountReads.per_step = []
    run(
        "fit", "imagenet256_maetok_b128", tmp_path, digits_root,
        "--trainer.max_steps=5", "--trainer.log_every_n_steps=5", "--trainer.val_check_interval=5",
        f"--trainer.callbacks={json.dumps(CALLBACKS)}",
    )  # fmt: skip
    assert CountReads.per_step[:4] == [3] * 4
    assert CountReads.per_step[4] > 20
