"""The order of samples is complete, shuffled and independent of processes, and resumes exactly."""

from itertools import islice

import numpy as np
import pytest

from datamodules.order import EpochShuffle, EvaluationOrder, ShardwiseOrder, TrainingOrder

Batch = list[tuple[int, int]]


def places(
    shuffle: EpochShuffle, batch_size: int, world_size: int, start: int, batches: int, drop_tail: bool = False
) -> list[Batch]:
    """Return global batches as lists of (epoch, index), merged from all processes."""
    per_rank = [
        list(islice(TrainingOrder(shuffle, batch_size, rank, world_size, lambda: start, drop_tail), batches))
        for rank in range(world_size)
    ]
    merged = []
    for parts in zip(*per_rank, strict=True):
        assert {reference.position for reference in parts} == {start + batch_size * (len(merged) + 1)}
        batch: Batch = [(-1, -1)] * batch_size
        for rank, part in enumerate(parts):
            batch[rank::world_size] = list(zip(part.epochs.tolist(), part.indices.tolist(), strict=True))
        merged.append(batch)
    return merged


TEN = EpochShuffle([4, 3, 3], seed=3)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("window", [None, 1, 2])
def test_every_sample_once_per_epoch_whatever_the_number_of_processes(world_size: int, window: int | None) -> None:
    shuffle = EpochShuffle([4, 3, 3], seed=3, window=window)
    batches = places(shuffle, 6, world_size, start=0, batches=10)  # six epochs
    flat = [place for batch in batches for place in batch]
    assert [epoch for epoch, _ in flat] == sorted(epoch for epoch, _ in flat)
    for epoch in range(6):
        seen = [index for of_epoch, index in flat if of_epoch == epoch]
        assert sorted(seen) == list(range(10))
    assert batches == places(shuffle, 6, 1, 0, 10)


def test_batches_larger_than_an_epoch_wrap() -> None:
    (batch,) = places(EpochShuffle([2], seed=0), 6, 3, start=0, batches=1)
    assert sorted(batch) == [(epoch, index) for epoch in range(3) for index in range(2)]


def test_a_run_continues_at_its_position_with_another_number_of_processes() -> None:
    uninterrupted = places(TEN, 6, world_size=1, start=0, batches=8)
    assert places(TEN, 6, world_size=3, start=18, batches=5) == uninterrupted[3:]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_dropping_the_tail_leaves_out_other_samples_in_each_epoch(world_size: int) -> None:
    batches = places(TEN, 6, world_size, start=0, batches=40, drop_tail=True)
    assert all(len({epoch for epoch, _ in batch}) == 1 for batch in batches)
    assert [batch[0][0] for batch in batches] == list(range(40))  # one batch of six fits into ten
    assert all(len({index for _, index in batch}) == 6 for batch in batches)
    assert {index for batch in batches for _, index in batch} == set(range(10))
    assert places(TEN, 6, world_size, start=18, batches=2, drop_tail=True) == batches[3:5]


def test_dropping_the_only_batch_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"batch_size=12, drop_tail=True: an epoch of 10 samples has no batch"):
        TrainingOrder(TEN, 12, 0, 1, lambda: 0, drop_tail=True)


def test_position_is_read_at_every_iteration() -> None:
    position = 0
    order = TrainingOrder(TEN, 2, 0, 1, lambda: position)
    first = next(iter(order))
    position = 2
    assert next(iter(order)).indices.tolist() != first.indices.tolist()
    assert next(iter(order)).position == 4


def test_epochs_and_seeds_are_shuffled_differently() -> None:
    orders = [EpochShuffle([1000], seed)(epoch) for seed in (0, 1) for epoch in (0, 1)]
    for number, order in enumerate(orders):
        assert sorted(order) == list(range(1000))
        assert all((order != other).mean() > 0.99 for other in orders[:number])


def test_samples_sorted_by_class_come_out_mixed() -> None:
    """Counts of ten classes in batches of 100: multinomial, so chi-square with 9 degrees of freedom, mean 9."""
    labels = np.repeat(np.arange(10), 1000)[EpochShuffle([100] * 100, seed=0)(0)]
    counts = np.stack([np.bincount(batch, minlength=10) for batch in labels.reshape(-1, 100)])
    chi_square = ((counts - 10) ** 2 / 10).sum(1)
    assert chi_square.mean() == pytest.approx(9, abs=1.5)
    assert chi_square.max() < 33  # 99.99 % quantile


def test_a_window_shuffles_whole_shards_and_the_samples_of_neighbours() -> None:
    shard_of = np.repeat(np.arange(6), 5)
    pairs = set()
    for epoch in range(20):
        order = EpochShuffle([5] * 6, seed=1, window=2)(epoch)
        for window in order.reshape(3, 10):
            shards = sorted(set(shard_of[window]))
            assert len(shards) == 2
            assert sorted(window) == [index for shard in shards for index in range(5 * shard, 5 * shard + 5)]
            pairs.add(tuple(shards))
    assert len(pairs) > 10  # of 15: other shards meet in each epoch


@pytest.mark.parametrize("count", [1, 5, 12, 13])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_sees_every_sample_once_with_equal_batches(count: int, world_size: int) -> None:
    orders = [list(EvaluationOrder(count, 6, rank, world_size)) for rank in range(world_size)]
    assert {len(order) for order in orders} == {-(-count // 6)}
    indices = [index for order in orders for batch in order for index in batch.indices]
    assert sorted(index for index in indices if index >= 0) == list(range(count))
    assert all(len(batch.indices) == 6 // world_size for order in orders for batch in order)


def test_evaluation_can_take_every_third_sample() -> None:
    orders = [list(EvaluationOrder(10, 2, rank, 2, stride=3)) for rank in range(2)]
    assert sorted(index for order in orders for batch in order for index in batch.indices) == [0, 3, 6, 9]
    assert len(EvaluationOrder(10, 2, 0, 2, stride=3)) == 2


@pytest.mark.parametrize("world_size", [1, 2])
def test_shardwise_batches_never_mix_shards(world_size: int) -> None:
    ranges = [(0, 5), (5, 7), (7, 8)]
    seen = []
    for rank in range(world_size):
        order = ShardwiseOrder(ranges, 4, rank, world_size)
        batches = list(order)
        assert len(batches) == len(order)
        for batch in batches:
            assert len(batch.indices) == 4 // world_size
            valid = batch.indices[batch.indices >= 0]
            assert any(first <= valid.min() and valid.max() < end for first, end in ranges[rank::world_size])
            seen += valid.tolist()
    assert sorted(seen) == list(range(8))


def test_batch_size_must_divide() -> None:
    with pytest.raises(
        ValueError, match=r"data\.init_args\.batch_size=7 .* positive multiple of the number of processes, 2"
    ):
        TrainingOrder(TEN, 7, 0, 2, lambda: 0)
    with pytest.raises(ValueError, match="an epoch of 0 samples has no batch"):
        TrainingOrder(EpochShuffle([], seed=0), 2, 0, 1, lambda: 0)
