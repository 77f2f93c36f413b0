"""The order of samples: an endless training order whose whole state is one integer, and exact evaluation orders.

Training reads S = order(epoch 0) ++ order(epoch 1) ++ ... At position p one global batch is S[p : p + G], and process r
of W takes every W-th sample of it. Every sample occurs exactly once per epoch, a batch may span two epochs, and a run
resumes at its position with any number of processes and workers. docs/data.md measures the shuffle.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler


class BatchReference(NamedTuple):
    """The samples that one process reads for one batch."""

    indices: np.ndarray
    """(B,) int64 indices into the split; -1 for padding."""
    epochs: np.ndarray
    """(B,) int64 epoch of each sample."""
    position: int
    """In training the position after the batch, counted over all processes; in shardwise reading the first sample after
    the batch; otherwise 0."""


@dataclass(frozen=True)
class EpochShuffle:
    """The order of the samples in each epoch, equal on every process.

    Args:
        shard_sizes: samples of each shard; samples are numbered shard after shard.
        seed: seed of the order.
        window: None shuffles all samples together. A number W permutes the shards, then shuffles the samples of W
            shards together, then the samples of the next W, for storage that is too small or too slow for all shards.
    """

    shard_sizes: Sequence[int]
    seed: int
    window: int | None = None

    def __len__(self) -> int:
        return int(sum(self.shard_sizes))

    def __call__(self, epoch: int) -> np.ndarray:
        """Return the (n,) int64 permutation of the samples for one epoch."""
        rng = np.random.Generator(np.random.PCG64([self.seed, epoch]))
        if self.window is None:
            return rng.permutation(len(self))
        ends = np.cumsum(self.shard_sizes)
        shards = rng.permutation(len(ends))
        windows = []
        for first in range(0, len(shards), self.window):
            parts = [np.arange(ends[s] - self.shard_sizes[s], ends[s]) for s in shards[first : first + self.window]]
            windows.append(rng.permutation(np.concatenate(parts)))
        return np.concatenate(windows)


class TrainingOrder(Sampler[BatchReference]):
    """Endless batch sampler over :class:`EpochShuffle`.

    Args:
        shuffle: order of the samples in an epoch.
        batch_size: samples per batch over all processes.
        rank: this process.
        world_size: number of processes; must divide ``batch_size``.
        start: called at every ``iter()``; returns the position to begin at.
        drop_tail: leave out the samples that do not fill the last batch of an epoch (different ones in every epoch), so
            that no batch spans two epochs.

    Raises:
        ValueError: if ``batch_size`` is not divisible by ``world_size``, or an epoch has no samples.
    """

    def __init__(
        self,
        shuffle: EpochShuffle,
        batch_size: int,
        rank: int,
        world_size: int,
        start: Callable[[], int],
        drop_tail: bool = False,
    ) -> None:
        check_divisible("batch_size", batch_size, world_size)
        self.shuffle, self.start = shuffle, start
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.epoch_samples = samples_per_epoch(len(shuffle), batch_size, drop_tail)

    def __iter__(self) -> Iterator[BatchReference]:
        """Yield this process's part of one global batch after another, endlessly, beginning at ``start()``."""
        position = self.start()
        epoch, order = -1, np.empty(0, dtype=np.int64)
        while True:
            end = position + self.batch_size
            epochs, places = np.divmod(np.arange(position + self.rank, end, self.world_size), self.epoch_samples)
            indices = np.empty_like(places)
            for number in range(epochs[0], epochs[-1] + 1):
                if number != epoch:
                    epoch, order = number, self.shuffle(number)
                here = epochs == number
                indices[here] = order[places[here]]
            yield BatchReference(indices, epochs, end)
            position = end


def samples_per_epoch(count: int, batch_size: int, drop_tail: bool) -> int:
    """Return the number of samples in an epoch: all of them unless the tail is dropped.

    Raises:
        ValueError: if there are none.
    """
    used = count - count % batch_size if drop_tail else count
    if used < 1:
        raise ValueError(
            f"data.init_args.batch_size={batch_size}, drop_tail={drop_tail}: an epoch of {count} samples has no batch; "
            "use more samples, a smaller batch_size or drop_tail: false"
        )
    return used


class EvaluationOrder(Sampler[BatchReference]):
    """Finite batch sampler in stored order: every sample once, the same number of batches on every process.

    Padding (index -1) fills the last batches, so no process waits for another.

    Args:
        count: samples in the split.
        batch_size: samples per batch over all processes.
        rank: this process.
        world_size: number of processes; must divide ``batch_size``.
        stride: read only every n-th sample.

    Raises:
        ValueError: if ``batch_size`` is not divisible by ``world_size``.
    """

    def __init__(self, count: int, batch_size: int, rank: int, world_size: int, stride: int = 1) -> None:
        check_divisible("evaluation_batch_size", batch_size, world_size)
        self.stride = stride
        self.count, self.batch_size, self.rank, self.world_size = count, batch_size, rank, world_size

    def __len__(self) -> int:
        return math.ceil(math.ceil(self.count / self.stride) / self.batch_size)

    def __iter__(self) -> Iterator[BatchReference]:
        """Yield this process's part of one global batch after another."""
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            indices = np.arange(start + self.rank, start + self.batch_size, self.world_size) * self.stride
            yield evaluation_batch(np.where(indices < self.count, indices, -1))


class ShardwiseOrder(Sampler[BatchReference]):
    """Finite batch sampler in which no batch spans two shards. Each process takes whole shards.

    A process may have more batches than another, so nothing that runs per batch may wait for other processes.

    Args:
        ranges: (first, end) sample of each shard to read.
        batch_size: samples per batch over all processes; each process takes its share.
        rank: this process.
        world_size: number of processes; must divide ``batch_size``.

    Raises:
        ValueError: if ``batch_size`` is not divisible by ``world_size``.
    """

    def __init__(self, ranges: Sequence[tuple[int, int]], batch_size: int, rank: int, world_size: int) -> None:
        check_divisible("evaluation_batch_size", batch_size, world_size)
        self.ranges, self.own_batch_size = ranges[rank::world_size], batch_size // world_size

    def __len__(self) -> int:
        return sum(math.ceil((end - first) / self.own_batch_size) for first, end in self.ranges)

    def __iter__(self) -> Iterator[BatchReference]:
        """Yield the batches of one shard after another; the last batch of each shard is padded."""
        for first, end in self.ranges:
            for start in range(first, end, self.own_batch_size):
                indices = np.arange(start, start + self.own_batch_size)
                after = min(start + self.own_batch_size, end)
                yield evaluation_batch(np.where(indices < end, indices, -1), after)


def evaluation_batch(indices: np.ndarray, position: int = 0) -> BatchReference:
    """Return a batch outside training, where there are no epochs."""
    return BatchReference(indices, np.zeros_like(indices), position)


def check_divisible(key: str, batch_size: int, world_size: int) -> None:
    """Raise ValueError with the config key unless a global batch divides evenly among the processes."""
    if batch_size < 1 or batch_size % world_size:
        raise ValueError(
            f"data.init_args.{key}={batch_size} counts samples over all processes and must be a positive multiple of "
            f"the number of processes, {world_size}"
        )
