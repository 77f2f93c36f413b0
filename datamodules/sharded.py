"""What image and latent datamodules share: the resumable order, evaluation without loss, and how workers load."""

import math
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
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
    """How batches get to the training process.

    Args:
        num_workers: loader processes per training process; 0 reads in the training process.
        prefetch_factor: batches that each loader process prepares ahead.
        pin_memory: hand batches over in page-locked memory where there is a GPU.
        persistent_workers: keep loader processes between epochs and evaluations.
        timeout: seconds after which a batch that does not come is an error; 0 waits for ever.
    """

    num_workers: int = 8
    prefetch_factor: int = 2
    pin_memory: bool = True
    persistent_workers: bool = True
    timeout: float = 600

    def loader(self, dataset: Dataset[Any], order: Sampler[BatchReference]) -> DataLoader[Any]:
        """A loader of whole batches."""
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
            batch_sampler=order,  # type: ignore[arg-type] # the dataset understands what the order yields
            collate_fn=identity,
            num_workers=self.num_workers,
            pin_memory=pin_memory,
            **workers,
        )


def ignore_job_signals(worker: int) -> None:
    """Leave USR1 and TERM, which a cluster sends to every process of a job, to the training process."""
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class BatchLoader(DataLoader[Any]):
    """A loader that turns arrays into tensors only where batches arrive, and knows how long these were waited for.

    A worker hands over each tensor as a shared file, which takes longer than to send a small array as it is.
    """

    seconds_waited = 0.0
    """Seconds that whoever takes the batches has spent in here, in all iterations; ``callbacks.Throughput`` logs it."""

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
    """The datasets make whole batches themselves."""
    return batch


class SampleIndex(Protocol):
    """What this module needs to know of the samples of a split."""

    @property
    def shard_samples(self) -> Sequence[int]:
        """Samples of each shard; samples are numbered shard after shard."""

    def __len__(self) -> int: ...

    def fingerprint(self) -> str:
        """Equal for equal data."""


class ShardedData(LightningDataModule):
    """Base of the datamodules that read shards in the order of :mod:`datamodules.order`.

    The order of training samples is a function of ``seed`` and one position, which checkpoints hold, so a run continues
    with the very next sample, on any number of processes and workers.

    Args:
        batch_size: samples per micro-batch over all processes.
        evaluation_batch_size: the same for evaluation; ``batch_size`` if not given.
        loading: worker processes.
        shuffle_window: shards that are shuffled together; null for all.
        drop_tail: leave out what does not fill the last batch of an epoch.
        seed: seed of order and augmentation; ``seed_everything`` if not given.

    Raises:
        ValueError: if ``shuffle_window`` is less than 1.
    """

    def __init__(
        self,
        batch_size: int,
        evaluation_batch_size: int | None,
        loading: Loading,
        shuffle_window: int | None,
        drop_tail: bool,
        seed: int | None,
    ) -> None:
        super().__init__()
        if shuffle_window is not None and shuffle_window < 1:
            raise ValueError(
                f"data.init_args.shuffle_window={shuffle_window} must be at least 1, or null for all shards"
            )
        self.batch_size, self.evaluation_batch_size = batch_size, evaluation_batch_size or batch_size
        self.loading, self.shuffle_window, self.drop_tail = loading, shuffle_window, drop_tail
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", "0")) if seed is None else seed
        # Processes share out whole shards when predicting, so one may have none.
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self.position = 0
        self.training_batches = 0

    def index(self, split: Split) -> SampleIndex:
        """The samples of a split."""
        raise NotImplementedError

    def dataset(self, split: Split, training: bool) -> Dataset[Any]:
        """Reads whole batches by :class:`BatchReference`; random augmentation only in training."""
        raise NotImplementedError

    @property
    def epoch_samples(self) -> int:
        """Training samples per epoch."""
        return samples_per_epoch(len(self.index("train")), self.batch_size, self.drop_tail)

    def train_dataloader(self) -> DataLoader[Any]:
        """Endless loader that starts at the saved position; read anew at every ``iter()``."""
        shuffle = EpochShuffle(self.index("train").shard_samples, self.seed, self.shuffle_window)
        order = TrainingOrder(shuffle, self.batch_size, *self.process, lambda: self.position, self.drop_tail)
        return self.loading.loader(self.dataset("train", training=True), order)

    def val_dataloader(self) -> DataLoader[Any]:
        """Every validation sample exactly once, over all processes."""
        return self.evaluation_dataloader("validation")

    def test_dataloader(self) -> DataLoader[Any]:
        """The validation split: there is no third one."""
        return self.evaluation_dataloader("validation")

    def evaluation_dataloader(self, split: Split, max_samples: int | None = None) -> DataLoader[Any]:
        """A split in stored order without augmentation, each sample exactly once over all processes.

        With ``max_samples``, every n-th sample is read so that there are no more than these.
        """
        count = len(self.index(split))
        stride = math.ceil(count / max_samples) if max_samples else 1
        order = EvaluationOrder(count, self.evaluation_batch_size, *self.process, stride=stride)
        return self.loading.loader(self.dataset(split, training=False), order)

    def shardwise_dataloader(self, split: Split, shards: Sequence[int]) -> DataLoader[Any]:
        """Some shards of a split in stored order, one after another; each process reads others of them."""
        samples = self.index(split).shard_samples
        ranges = [(sum(samples[:shard]), sum(samples[: shard + 1])) for shard in shards]
        order = ShardwiseOrder(ranges, self.evaluation_batch_size, *self.process)
        return self.loading.loader(self.dataset(split, training=False), order)

    @property
    def process(self) -> tuple[int, int]:
        """Rank of this process, and how many there are."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Note how far training has come.

        Lightning calls this for the batch that is trained next, not for those prefetched, so the position is that of
        samples really used.
        """
        if self.trainer is not None and self.trainer.training:
            self.position = int(batch["position"])
            self.training_batches += 1
            interval = self.trainer.log_every_n_steps  # 0 is never
            if interval and self.training_batches % interval == 0:
                self.report()
        return batch

    def report(self) -> None:
        """Log ``data/epoch``, how often the training data has been seen, for the step that uses this batch.

        All processes call this at the same batch.
        """
        assert self.trainer is not None
        if self.trainer.logger is not None and self.trainer.training:
            epoch = self.position / self.epoch_samples
            self.trainer.logger.log_metrics({"data/epoch": epoch}, step=self.trainer.global_step + 1)

    def state_dict(self) -> dict[str, Any]:
        """Position in the order, and what the order depends on."""
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
            ShardError: if seed or data differ from those of the checkpoint, for then the order would not continue.
        """
        if self.trainer is not None and self.trainer.state.fn != "fit":
            return  # other subcommands read in stored order
        for key, value in self.state_dict().items():
            if key != "position" and state_dict.get(key) != value:
                raise ShardError(
                    f"cannot continue the data order: {key} was {state_dict.get(key)} in the checkpoint and is {value} "
                    "now. Use the same shards and the same data.init_args.seed, shuffle_window, drop_tail and (with "
                    "drop_tail) batch_size, or start a new run"
                )
        self.position = state_dict["position"]
