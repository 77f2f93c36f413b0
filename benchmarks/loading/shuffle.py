"""Measure how well an order mixes classes: ``python -m benchmarks.loading.shuffle``.

This is a simulation: it reads no data and measures no time.

The worst case: 1.28 million samples of 1,000 classes, packed into 1,281 shards class after class.
"""

import random
from collections.abc import Iterator

import numpy as np

CLASSES, SHARDS, SAMPLES_PER_SHARD, BATCH_SIZE = 1000, 1281, 1000, 256
WINDOWS = (64, 16, 4)
BUFFERS = (5000, 1000)
BATCHES = 1000


def labels() -> np.ndarray:
    """Return the (n,) label of each sample in stored order: all of class 0, then all of class 1 and so on."""
    count = SHARDS * SAMPLES_PER_SHARD
    return np.arange(count) * CLASSES // count


def buffered(shards: np.ndarray, size: int, rng: random.Random) -> Iterator[int]:
    """Yield samples of shards as webdataset's ``shuffle(size, initial=size)`` does: each drawn from a full buffer."""
    buffer: list[int] = []
    for shard in shards.tolist():
        for sample in range(shard * SAMPLES_PER_SHARD, (shard + 1) * SAMPLES_PER_SHARD):
            if len(buffer) < size:
                buffer.append(sample)
                continue
            place = rng.randrange(size)
            yield buffer[place]
            buffer[place] = sample
    rng.shuffle(buffer)
    yield from buffer


def buffered_batches(size: int, processes: int, seed: int = 0) -> np.ndarray:
    """Return (batches, 256) samples of shuffled shards; each process has a buffer and fills a share of a batch."""
    shards = np.random.default_rng(seed).permutation(SHARDS)
    streams = [
        np.fromiter(buffered(shards[process::processes], size, random.Random(process)), dtype=np.int64)
        for process in range(processes)
    ]
    share = BATCH_SIZE // processes
    count = min(len(stream) for stream in streams) // share
    return np.concatenate([stream[: count * share].reshape(count, share) for stream in streams], axis=1)


def window_batches(window: int | None) -> np.ndarray:
    """Return (batches, 256) samples in the suite's order of the first epoch."""
    from datamodules.order import EpochShuffle

    order = EpochShuffle([SAMPLES_PER_SHARD] * SHARDS, 0, window)(0)
    count = len(order) // BATCH_SIZE
    return order[: count * BATCH_SIZE].reshape(count, BATCH_SIZE)


def distinct_classes(batches: np.ndarray) -> tuple[float, float]:
    """Return the mean number of classes in a batch, and the number that 95 % of the batches exceed."""
    chosen = batches[np.linspace(0, len(batches) - 1, BATCHES).astype(int)]
    counts = [len(np.unique(row)) for row in labels()[chosen]]
    return float(np.mean(counts)), float(np.percentile(counts, 5))


def shuffle_table() -> str:
    """Return Markdown: classes per batch of the suite's orders and of shuffle buffers."""
    orders = {"all samples together (default)": window_batches(None)}
    orders |= {f"window of {window} shards": window_batches(window) for window in WINDOWS}
    for processes in (8, 1):
        each = f"{processes} process{'es' * (processes > 1)}"
        orders |= {
            f"buffer of {size:,}, shuffled shards, {each}": buffered_batches(size, processes) for size in BUFFERS
        }
    lines = ["| order | classes in a batch of 256 | 95 % of the batches have more than |", "|---|---|---|"]
    for name, batches in orders.items():
        mean, low = distinct_classes(batches)
        lines.append(f"| {name} | {mean:.0f} | {low:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(shuffle_table())
