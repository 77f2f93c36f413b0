"""The common base of the datamodules: the resumable order, exact evaluation, and the loader processes."""

import math
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveInt
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset, Sampler

from datamodules.base import Split
from datamodules.order import (
    BatchReference,
    EpochShuffle,
    EvaluationOrder,
    ShardwiseOrder,
    TrainingOrder,
    samples_per_epoch,
)
from datamodules.shards import ShardError


@dataclass(frozen=True)
class Loading:
    """How batches reach the training process.

    Args:
        num_workers: loader processes per training process; 0 reads in the training process.
        prefetch_factor: batches that each loader process prepares ahead.
        pin_memory: pass batches in page-locked memory if there is a GPU.
        persistent_workers: keep loader processes between epochs and evaluations.
        timeout: seconds after which a missing batch is an error; 0 disables the limit.
    """

    num_workers: NonNegativeInt = 8
    prefetch_factor: PositiveInt = 2
    pin_memory: bool = True
    persistent_workers: bool = True
    timeout: NonNegativeFloat = 600

    def loader(self, dataset: Dataset[Any], order: Sampler[BatchReference]) -> DataLoader[Any]:
        """Return a loader of whole batches."""
        workers: dict[str, Any] = {}
        if self.num_workers:
            workers = {
                "prefetch_factor": self.prefetch_factor,
                "persistent_workers": self.persistent_workers,
                "timeout": self.timeout,
                "worker_init_fn": ignore_job_signals,
            }
        pin_memory = self.pin_memory and torch.cuda.is_available()
        return BatchLoader(
            dataset,
            batch_sampler=order,  # type: ignore[arg-type] # the dataset takes a BatchReference
            collate_fn=identity,
            num_workers=self.num_workers,
            pin_memory=pin_memory,
            **workers,
        )


def ignore_job_signals(worker: int) -> None:
    """Ignore USR1 and TERM in a loader process: a cluster sends them to every process, the training process reacts."""
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class BatchLoader(DataLoader[Any]):
    """A loader that turns arrays into tensors in the training process, and measures how long it waits for batches.

    A worker passes each tensor as a shared file, which takes longer than sending a small array.
    """

    seconds_waited = 0.0
    """Seconds that the caller has waited for batches, over all iterations; ``callbacks.Throughput`` logs it."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yield batches of tensors."""
        batches = super().__iter__()
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            self.seconds_waited += time.perf_counter() - started
            if batch is None:
                return
            yield {
                name: torch.as_tensor(value) if isinstance(value, np.ndarray | int) else value
                for name, value in batch.items()
            }


def identity(batch: Any) -> Any:
    """Return a batch unchanged: the datasets build whole batches."""
    return batch


class SampleIndex(Protocol):
    """The samples of a split, as the order of a datamodule sees them."""

    @property
    def shard_samples(self) -> Sequence[int]:
        """Number of samples of each shard; samples are numbered shard after shard."""

    def __len__(self) -> int: ...

    def fingerprint(self) -> str:
        """Return a string that is equal for equal data; a checkpoint records it."""


class ShardedData(LightningDataModule):
    """Base of the datamodules that read samples in the order of :mod:`datamodules.order`.

    The order of training samples is a function of ``seed`` and one position. Checkpoints hold the position, so a run
    resumes with the very next sample, on any number of processes and workers.

    Args:
        batch_size: samples per micro-batch over all processes.
        evaluation_batch_size: samples per evaluation batch over all processes; ``batch_size`` if not given.
        loading: worker processes, prefetching, pinned memory.
        shuffle_window: number of shards that are shuffled together; null shuffles all. See docs/data.md.
        drop_tail: leave out the samples that do not fill the last batch of an epoch; otherwise that batch continues
            with the next epoch.
        seed: seed of order and augmentation; ``seed_everything`` if not given.
    """

    def __init__(
        self,
        batch_size: PositiveInt = 256,
        evaluation_batch_size: PositiveInt | None = None,
        loading: Loading = Loading(),
        shuffle_window: PositiveInt | None = None,
        drop_tail: bool = False,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.batch_size, self.evaluation_batch_size = batch_size, evaluation_batch_size or batch_size
        self.loading, self.drop_tail = loading, drop_tail
        # a plain int: checkpoints hold it, and may hold no class of jsonargparse
        self.shuffle_window = None if shuffle_window is None else int(shuffle_window)
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", "0")) if seed is None else seed
        # In prediction each process takes whole shards, so one may have none.
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self.indices: dict[Split, Any] = {}
        self.position = 0
        self.training_batches = 0

    def index(self, split: Split) -> SampleIndex:
        """Return the samples of a split."""
        raise NotImplementedError

    def dataset(self, split: Split, training: bool) -> Dataset[Any]:
        """Return a dataset that reads a whole batch by :class:`BatchReference`; it augments only in training."""
        raise NotImplementedError

    @property
    def epoch_samples(self) -> int:
        """Number of training samples per epoch."""
        return samples_per_epoch(len(self.index("train")), self.batch_size, self.drop_tail)

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the endless training loader; every ``iter()`` starts at the current position."""
        shuffle = EpochShuffle(self.index("train").shard_samples, self.seed, self.shuffle_window)
        order = TrainingOrder(shuffle, self.batch_size, *self.process, lambda: self.position, self.drop_tail)
        return self.loading.loader(self.dataset("train", training=True), order)

    def val_dataloader(self) -> DataLoader[Any]:
        """Read every validation sample exactly once over all processes."""
        return self.evaluation_dataloader("validation")

    def test_dataloader(self) -> DataLoader[Any]:
        """Read the validation split: there is no test split."""
        return self.evaluation_dataloader("validation")

    def evaluation_dataloader(self, split: Split, max_samples: int | None = None) -> DataLoader[Any]:
        """Read a split in stored order without augmentation, each sample exactly once over all processes.

        With ``max_samples``, read every n-th sample, with the smallest n that gives at most that many.
        """
        count = len(self.index(split))
        stride = math.ceil(count / max_samples) if max_samples else 1
        order = EvaluationOrder(count, self.evaluation_batch_size, *self.process, stride=stride)
        return self.loading.loader(self.dataset(split, training=False), order)

    def shardwise_dataloader(self, split: Split, shards: Sequence[int]) -> DataLoader[Any]:
        """Read some shards of a split in stored order, one after another; the processes share the shards."""
        samples = self.index(split).shard_samples
        ranges = [(sum(samples[:shard]), sum(samples[: shard + 1])) for shard in shards]
        order = ShardwiseOrder(ranges, self.evaluation_batch_size, *self.process)
        return self.loading.loader(self.dataset(split, training=False), order)

    @property
    def process(self) -> tuple[int, int]:
        """Rank of this process and number of processes."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Record the training position.

        Lightning calls this for the batch that is trained next, not for prefetched ones, so the position counts only
        samples that were used.
        """
        if self.trainer is not None and self.trainer.training:
            self.position = int(batch["position"])
            self.training_batches += 1
            interval = self.trainer.log_every_n_steps  # 0 disables it
            if interval and self.training_batches % interval == 0:
                self.report()
        return batch

    def report(self) -> None:
        """Log ``data/epoch``, the number of passes over the training data, for the step that uses this batch.

        All processes call this at the same batch.
        """
        assert self.trainer is not None
        if self.trainer.logger is not None and self.trainer.training:
            epoch = self.position / self.epoch_samples
            self.trainer.logger.log_metrics({"data/epoch": epoch}, step=self.trainer.global_step + 1)

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the order and everything that the order depends on."""
        return {
            "position": self.position,
            "seed": self.seed,
            "samples": len(self.index("train")),
            "epoch_samples": self.epoch_samples,
            "shuffle_window": self.shuffle_window,
            "fingerprint": self.index("train").fingerprint(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue at a saved position.

        Raises:
            ShardError: if seed or data differ from the checkpoint's, so that the order would not continue.
        """
        if self.trainer is not None and self.trainer.state.fn != "fit":
            return  # the other subcommands read in stored order
        for key, value in self.state_dict().items():
            if key != "position" and state_dict.get(key) != value:
                raise ShardError(
                    f"cannot continue the data order: {key} was {state_dict.get(key)} in the checkpoint and is {value} "
                    "now. Use the same shards and the same data.init_args.seed, shuffle_window, drop_tail and (with "
                    "drop_tail) batch_size, or start a new run"
                )
        self.position = state_dict["position"]
