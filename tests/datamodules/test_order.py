"""The order of samples: complete, shuffled, independent of processes, continued exactly."""

from itertools import islice

import numpy as np
import pytest

from datamodules.order import EvaluationOrder, TrainingOrder, permutation


def places(count: int, batch_size: int, world_size: int, start: int, batches: int) -> list[list[tuple[int, int]]]:
    """Global batches as lists of (epoch, index), put together from all processes."""
    per_rank = [
        list(islice(TrainingOrder(count, batch_size, rank, world_size, seed=3, start=lambda: start), batches))
        for rank in range(world_size)
    ]
    merged = []
    for parts in zip(*per_rank, strict=True):
        assert {reference.position for part in parts for reference in part} == {start + batch_size * (len(merged) + 1)}
        batch = [None] * batch_size
        for rank, part in enumerate(parts):
            batch[rank::world_size] = [(reference.epoch, reference.index) for reference in part]
        merged.append(batch)
    return merged


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_sample_once_per_epoch_whatever_the_number_of_processes(world_size: int) -> None:
    batches = places(count=10, batch_size=6, world_size=world_size, start=0, batches=10)  # six epochs
    flat = [place for batch in batches for place in batch]
    for epoch in range(6):
        seen = [index for of_epoch, index in flat if of_epoch == epoch]
        assert sorted(seen) == list(range(10))
    assert batches == places(10, 6, 1, 0, 10)


def test_a_run_continues_at_its_position_with_another_number_of_processes() -> None:
    uninterrupted = places(count=10, batch_size=6, world_size=1, start=0, batches=8)
    assert places(count=10, batch_size=6, world_size=3, start=18, batches=5) == uninterrupted[3:]


def test_position_is_read_at_every_iteration() -> None:
    position = 0
    order = TrainingOrder(10, 2, 0, 1, seed=0, start=lambda: position)
    first = next(iter(order))
    position = 2
    assert next(iter(order)) != first
    assert next(iter(order))[0].position == 4


def test_epochs_and_seeds_are_shuffled_differently() -> None:
    orders = [permutation(1000, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    for number, order in enumerate(orders):
        assert sorted(order) == list(range(1000))
        assert all((order != other).mean() > 0.99 for other in orders[:number])


def test_samples_sorted_by_class_come_out_mixed() -> None:
    labels = np.repeat(np.arange(10), 100)[permutation(1000, 0, 0)]
    counts = [len(set(labels[start : start + 50])) for start in range(0, 1000, 50)]
    assert min(counts) >= 8


@pytest.mark.parametrize("count", [1, 5, 12, 13])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_sees_every_sample_once_with_equal_batches(count: int, world_size: int) -> None:
    orders = [list(EvaluationOrder(count, 6, rank, world_size)) for rank in range(world_size)]
    assert {len(order) for order in orders} == {-(-count // 6)}
    indices = [reference.index for order in orders for batch in order for reference in batch]
    assert sorted(index for index in indices if index >= 0) == list(range(count))
    assert all(len(batch) == 6 // world_size for order in orders for batch in order)


def test_evaluation_can_take_every_third_sample() -> None:
    orders = [list(EvaluationOrder(10, 2, rank, 2, stride=3)) for rank in range(2)]
    assert sorted(reference.index for order in orders for batch in order for reference in batch) == [0, 3, 6, 9]
    assert len(EvaluationOrder(10, 2, 0, 2, stride=3)) == 2


def test_batch_size_must_divide() -> None:
    with pytest.raises(ValueError, match=r"data\.init_args\.batch_size=7 .* positive multiple of their number, 2"):
        TrainingOrder(10, 7, 0, 2, seed=0, start=lambda: 0)
    with pytest.raises(ValueError, match="hold no samples"):
        TrainingOrder(0, 2, 0, 1, seed=0, start=lambda: 0)
