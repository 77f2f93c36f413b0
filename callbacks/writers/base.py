"""Base of the callbacks that store predictions shard by shard."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_info


class ShardWriter(Callback):
    """Collects the predictions of a shard, writes them after its last sample, and skips shards that are complete.

    Processes take whole shards. A killed run resumes with the missing ones.

    Args:
        output: folder of the results.
    """

    splits: tuple[str, ...] = ("train",)
    """Split of each dataloader."""
    kind = "predictions"

    def __init__(self, output: str) -> None:
        self.output = Path(output)
        self.identity: Any = {}
        self.parts: list[Any] = []  # of the current shard
        self.current: tuple[str, int] | None = None

    def describe(self, trainer: Trainer, pl_module: Any, data: Any) -> Any:
        """Return what decides the predictions; results of another identity are refused."""
        raise NotImplementedError

    def begin(self, data: Any) -> dict[str, Any]:
        """Prepare the folder, on the first process; return the numbers of the complete shards of each split."""
        raise NotImplementedError

    def part(self, outputs: Any, batch: Any) -> Any:
        """Return the part of a batch to keep."""
        raise NotImplementedError

    def write(self, data: Any, split: str, number: int) -> None:
        """Write the collected parts of a shard."""
        raise NotImplementedError

    def finish(self, data: Any) -> None:
        """Complete the results, on the first process, when all processes have written their shards."""
        raise NotImplementedError

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Find the shards that are complete.

        Raises:
            FileExistsError: if the folder holds results of another identity.
        """
        if stage != "predict":
            return
        # The order yields every sample once, as its tests show, and a process may have no shard left.
        warnings.filterwarnings("ignore", "You are using a custom batch sampler|Total length of `.*`")
        data = trainer.datamodule  # type: ignore[attr-defined]
        self.identity = self.describe(trainer, pl_module, data)
        finished = self.begin(data) if trainer.is_global_zero else {}
        data.finished_shards = trainer.strategy.broadcast(finished)  # equal on all processes, which share the rest
        count = sum(map(len, data.finished_shards.values()))
        rank_zero_info(f"writing {self.kind} to {self.output}" + (f": {count} shards are complete" if count else ""))

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Collect one batch, and write the shard after its last sample."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        split, after = self.splits[dataloader_idx], int(batch["position"])
        ends = np.cumsum(data.index(split).shard_samples)
        number = int(np.searchsorted(ends, after))
        if self.current != (split, number):  # a shard that limit_predict_batches cut short is not written
            self.current, self.parts = (split, number), []
        self.parts.append(self.part(outputs, batch))
        if after == ends[number]:
            self.write(data, split, number)

    def teardown(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Complete the results."""
        if stage == "predict":
            trainer.strategy.barrier()
            if trainer.is_global_zero:
                self.finish(trainer.datamodule)  # type: ignore[attr-defined]
