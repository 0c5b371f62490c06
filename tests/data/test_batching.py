from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from firstlab.data.batching import Buckets, DistributedBatches, cut, epoch_batches, shard_batches
from firstlab.data.room import Room

ORDER = [[1, 5, 6, 0], [9, 4, 7], [2, 8, 3]]  # seed 3, epoch 0

samples, sizes, seeds = st.integers(1, 60), st.integers(1, 12), st.integers(0, 2**32)


@given(samples, sizes, seeds, st.integers(0, 5))
def test_an_epoch_is_a_partition_into_near_equal_batches(n, batch_size, seed, epoch):
    batches = epoch_batches(n, batch_size, seed, epoch)
    assert sorted(index for batch in batches for index in batch) == list(range(n))
    assert len(batches) == -(-n // batch_size)
    lengths = [len(batch) for batch in batches]
    assert 1 <= max(lengths) <= batch_size and max(lengths) - min(lengths) <= 1


def test_the_order_is_fixed_for_all_time():
    assert epoch_batches(10, 4, seed=3, epoch=0) == ORDER
    assert epoch_batches(10, 4, seed=2, epoch=1) == ORDER
    assert epoch_batches(10, 4, seed=3, epoch=1) != ORDER
    assert epoch_batches(0, 4, seed=3, epoch=0) == []


@given(samples, sizes, st.integers(1, 5))
def test_shards_lose_and_double_nothing(n, batch_size, world_size):
    shards = [shard_batches(n, batch_size, rank, world_size) for rank in range(world_size)]
    flat = [[index for batch in shard for index in batch] for shard in shards]
    assert flat == [list(range(rank, n, world_size)) for rank in range(world_size)]
    assert all(1 <= len(batch) <= batch_size for shard in shards for batch in shard)
    if batch_size > 1 and n >= world_size:
        assert len({len(shard) for shard in shards}) == 1


@given(
    st.integers(1, 4).flatmap(lambda w: st.tuples(st.just(w), st.integers(2 * w, 40), st.integers(2 * w, 12))),
    seeds,
    st.integers(1, 30),
    st.data(),
)
def test_ranks_together_see_what_one_process_sees(setting, seed, total, data):
    world_size, n, batch_size = setting
    start = data.draw(st.integers(0, total))
    alone = list(DistributedBatches(n, batch_size, seed, total_batches=total))
    ranks = [
        list(DistributedBatches(n, batch_size, seed, total_batches=total, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert [sum(parts, []) for parts in zip(*ranks, strict=True)] == alone
    for parts in zip(*ranks, strict=True):
        lengths = [len(part) for part in parts]
        assert lengths == sorted(lengths, reverse=True) and 0 <= lengths[0] - lengths[-1] <= 1 and lengths[-1]
    resumed = DistributedBatches(n, batch_size, seed, total_batches=total, start_batch=start)
    assert list(resumed) == alone[start:] and len(resumed) == total


def test_a_run_goes_on_over_epochs():
    run = list(DistributedBatches(10, 4, 3, total_batches=7))
    assert run[:3] == ORDER and run[3:6] == epoch_batches(10, 4, 3, 1) and run[6:] == epoch_batches(10, 4, 3, 2)[:1]


buckets = st.builds(
    Buckets, st.lists(st.integers(1, 9), min_size=60, max_size=60), st.one_of(st.integers(1, 4), st.just(100))
)


@given(samples, sizes, seeds, st.integers(0, 5), buckets)
def test_buckets_lose_and_double_nothing(n, batch_size, seed, epoch, buckets):
    batches = epoch_batches(n, batch_size, seed, epoch, buckets)
    assert sorted(index for batch in batches for index in batch) == list(range(n))
    plain = epoch_batches(n, batch_size, seed, epoch)
    assert sorted(map(len, batches)) == sorted(map(len, plain))
    assert batches == epoch_batches(n, batch_size, seed, epoch, buckets), "depends on seed and epoch alone"


@given(samples, sizes, seeds, buckets)
def test_no_batch_of_one_bucket_reaches_into_another(n, batch_size, seed, buckets):
    whole = Buckets(buckets.lengths, 1000)
    spans = sorted(
        (min(lengths), max(lengths))
        for batch in epoch_batches(n, batch_size, seed, 0, whole)
        for lengths in [[whole.lengths[index] for index in batch]]
    )
    assert all(before[1] <= after[0] for before, after in zip(spans, spans[1:], strict=False))


def test_bucketed_batches_come_in_random_order():
    lengths = list(range(200))
    epochs = [epoch_batches(200, 5, 0, epoch, Buckets(lengths, 10)) for epoch in (0, 1)]
    shortest = [[min(batch) for batch in batches] for batches in epochs]
    assert all(found != sorted(found) for found in shortest) and epochs[0] != epochs[1]
    assert {tuple(sorted(batch)) for batch in epochs[0]} != {tuple(sorted(batch)) for batch in epochs[1]}


@given(st.integers(1, 3), st.integers(6, 40), st.integers(6, 12), seeds, st.integers(1, 30), buckets, st.data())
def test_ranks_and_resumed_runs_share_bucketed_batches(world_size, n, batch_size, seed, total, buckets, data):
    start = data.draw(st.integers(0, total))
    options = {"total_batches": total, "buckets": buckets}
    alone = list(DistributedBatches(n, batch_size, seed, **options))
    ranks = [
        list(DistributedBatches(n, batch_size, seed, rank=rank, world_size=world_size, **options))
        for rank in range(world_size)
    ]
    assert [sum(parts, []) for parts in zip(*ranks, strict=True)] == alone
    assert list(DistributedBatches(n, batch_size, seed, start_batch=start, **options)) == alone[start:]


def test_too_many_processes():
    with pytest.raises(ValueError, match="trainer.devices .* gives 4 processes, but batch_size=4 over 9 .* of 3:"):
        DistributedBatches(9, 4, 0, total_batches=1, world_size=4)
    DistributedBatches(8, 4, 0, total_batches=1, world_size=4)


def test_impossible_sizes():
    with pytest.raises(ValueError, match="data.train_size=0 leaves nothing"):
        DistributedBatches(0, 4, 0, total_batches=1)


def test_cut():
    assert cut(range(7), 3) == [[0, 1, 2], [3, 4], [5, 6]]


def test_passes_are_halved_until_they_fit_and_stay_so(capsys: pytest.CaptureFixture[str]):
    room, tried = Room(), []

    def read(rows: Sequence[int]) -> list[int]:
        tried.append(len(rows))
        if len(rows) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return list(rows)

    assert list(room.passes(range(2), read)) == [[0, 1]]
    assert sum(room.passes(range(10), read), []) == list(range(10))
    assert sum(room.passes(range(10, 15), read), []) == list(range(10, 15))
    assert tried == [2, 10, 5, 2, 2, 2, 2, 2, 2, 2, 1]
    assert capsys.readouterr().err.splitlines() == [
        "warning: out of memory: going on with 5 rows in a pass",
        "warning: out of memory: going on with 2 rows in a pass",
    ]


def test_a_row_that_does_not_fit_is_an_error():
    def read(rows: Sequence[int]) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        list(Room().passes(range(4), read))
