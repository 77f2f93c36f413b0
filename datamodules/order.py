"""Which sample comes when: one endless training order whose whole state is one integer, and an exact evaluation order.

Training reads S = permutation(seed, 0) ++ permutation(seed, 1) ++ ... At position p one global batch is S[p : p + G],
and process r of W takes every W-th sample of it. So every sample comes exactly once per epoch, a batch may cross the
border of two epochs, and a run continues at its position with any number of processes and workers.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler


class SampleReference(NamedTuple):
    """One sample to read; ``position`` is the training position after the batch it belongs to."""

    epoch: int
    index: int
    position: int


PADDING = SampleReference(epoch=0, index=-1, position=0)


def permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order of one epoch: a full permutation of ``count`` samples, the same on every process."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(count)


class TrainingOrder(Sampler[list[SampleReference]]):
    """Endless batch sampler over the order above.

    Args:
        count: samples in the split.
        batch_size: samples per batch over all processes.
        rank: this process.
        world_size: number of processes; must divide ``batch_size``.
        seed: seed of the order.
        start: called at every ``iter()`` for the position to begin at.

    Raises:
        ValueError: if ``batch_size`` is not divisible by ``world_size``, or there are no samples.
    """

    def __init__(
        self, count: int, batch_size: int, rank: int, world_size: int, seed: int, start: Callable[[], int]
    ) -> None:
        if count < 1:
            raise ValueError("data.init_args.train_shards: the shards hold no samples; pack some")
        check_divisible("batch_size", batch_size, world_size)
        self.count, self.batch_size, self.rank, self.world_size = count, batch_size, rank, world_size
        self.seed, self.start = seed, start

    def __iter__(self) -> Iterator[list[SampleReference]]:
        """Yield this process's part of one global batch after another, from ``start()`` on, for ever."""
        position = self.start()
        epoch, order = -1, np.empty(0, dtype=np.int64)
        while True:
            batch = []
            end = position + self.batch_size
            for place in range(position + self.rank, end, self.world_size):
                if place // self.count != epoch:
                    epoch = place // self.count
                    order = permutation(self.count, self.seed, epoch)
                batch.append(SampleReference(epoch, int(order[place % self.count]), end))
            yield batch
            position = end


class EvaluationOrder(Sampler[list[SampleReference]]):
    """Finite batch sampler in stored order: every sample once, the same number of batches on every process.

    What is missing in the last batches is filled with padding (index -1), so no process waits for another.

    Args:
        count: samples in the split.
        batch_size: samples per batch over all processes.
        rank: this process.
        world_size: number of processes; must divide ``batch_size``.
        stride: read every n-th sample only.

    Raises:
        ValueError: if ``batch_size`` is not divisible by ``world_size``.
    """

    def __init__(self, count: int, batch_size: int, rank: int, world_size: int, stride: int = 1) -> None:
        check_divisible("evaluation_batch_size", batch_size, world_size)
        self.stride = stride
        self.count, self.batch_size, self.rank, self.world_size = count, batch_size, rank, world_size

    def __len__(self) -> int:
        return math.ceil(math.ceil(self.count / self.stride) / self.batch_size)

    def __iter__(self) -> Iterator[list[SampleReference]]:
        """Yield this process's part of one global batch after another."""
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            places = range(start + self.rank, start + self.batch_size, self.world_size)
            indices = (place * self.stride for place in places)
            yield [SampleReference(0, index, 0) if index < self.count else PADDING for index in indices]


def check_divisible(key: str, batch_size: int, world_size: int) -> None:
    """Raise ValueError, naming the config key, unless a global batch divides evenly among the processes."""
    if batch_size < 1 or batch_size % world_size:
        raise ValueError(
            f"data.init_args.{key}={batch_size} counts samples over all processes and must be a positive multiple of "
            f"their number, {world_size}"
        )
