"""The global order: pure, complete, independent of the topology, balanced."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tide.data import DistributedBatchSampler, Stats


def _stats(count: int, seed: int = 0) -> Stats:
    random = np.random.default_rng(seed)
    lengths = random.integers(8, 512, size=(2, count)).astype(np.int32)
    return Stats(
        student_length=lengths[0], teacher_length=lengths[1], maskable=lengths[0], keys=np.arange(count, dtype=np.int64)
    )


def _samples(order: DistributedBatchSampler, step: int) -> list[int]:
    return [int(i) for rank in range(order.world) for part in order.microbatches(step, rank) for i in part]


@settings(max_examples=40, deadline=None)
@given(count=st.integers(16, 400), batches=st.integers(1, 4), seed=st.integers(0, 2**40), step=st.integers(0, 200))
def test_a_step_has_the_same_samples_on_every_topology(count: int, batches: int, seed: int, step: int) -> None:
    stats, size = _stats(count), 4 * batches
    expected = set(_samples(DistributedBatchSampler(stats, size, 1, 1, seed), step))
    assert len(expected) == size
    for world in (1, 2, 4):
        for micro in (1, 2, 4):
            if size % (world * micro) == 0:
                order = DistributedBatchSampler(stats, size, micro, world, seed)
                assert set(_samples(order, step)) == expected
                assert [len(order.microbatches(step, rank)) for rank in range(world)] == [order.accumulation] * world


def test_every_sample_once_an_epoch_and_another_order_each_epoch_and_seed() -> None:
    order = DistributedBatchSampler(_stats(96), 8, 2, 2, 7)
    epochs = [[_samples(order, step) for step in range(e * 12, (e + 1) * 12)] for e in range(3)]
    for epoch in epochs:
        assert sorted(i for batch in epoch for i in batch) == list(range(96))
    assert len({tuple(sorted(batch)) for epoch in epochs for batch in epoch}) == 36
    assert _samples(DistributedBatchSampler(_stats(96), 8, 2, 2, 8), 0) != epochs[0][0]


def test_strata_belong_to_the_samples_and_the_step():
    """However a global batch is split, a sample keeps its stratum; every step has another order."""
    seen = []
    for world, micro in ((1, 8), (1, 2), (2, 2), (4, 1)):
        order = DistributedBatchSampler(_stats(64), 8, micro, world, 3)
        mine = {}
        for rank in range(world):
            for samples, strata in zip(order.microbatches(5, rank), order.strata(5, rank), strict=True):
                mine |= dict(zip(samples.tolist(), strata.tolist(), strict=True))
        seen.append(mine)
    assert all(mine == seen[0] for mine in seen)
    assert sorted(seen[0].values()) == list(range(8))
    assert len({tuple(order.strata(step, 0)[0].tolist()) for step in range(6)}) > 1


def test_the_incomplete_last_batch_is_dropped_other_samples_each_epoch() -> None:
    order = DistributedBatchSampler(_stats(101), 8, 1, 1, 0)
    assert order.steps_per_epoch == 12
    left_out = []
    for epoch in range(4):
        seen = [i for step in range(epoch * 12, epoch * 12 + 12) for i in _samples(order, step)]
        assert len(set(seen)) == len(seen) == 96
        left_out.append(set(range(101)) - set(seen))
    assert len(set(map(frozenset, left_out))) > 1


def test_a_resumed_order_is_the_uninterrupted_one() -> None:
    whole = DistributedBatchSampler(_stats(64), 8, 2, 2, 3)
    before = [_samples(whole, step) for step in range(20)]
    for start in (0, 7, 8, 13):
        resumed = DistributedBatchSampler(_stats(64), 8, 2, 2, 3)
        assert [_samples(resumed, step) for step in range(start, 20)] == before[start:]
    assert [_samples(whole, step) for step in reversed(range(20))] == before[::-1]


def test_what_ranks_do_at_the_same_time_is_of_similar_length() -> None:
    stats = _stats(256)
    total = stats.student_length + stats.teacher_length
    order = DistributedBatchSampler(stats, 32, 4, 2, 1)
    for step in range(order.steps_per_epoch):
        of_ranks = [order.microbatches(step, rank) for rank in range(2)]
        slices = [np.concatenate([own[k] for own in of_ranks]) for k in range(order.accumulation)]
        shortest, longest = [total[s].min() for s in slices], [total[s].max() for s in slices]
        assert all(low >= high for low, high in zip(shortest, longest[1:]))
        for k in range(order.accumulation):
            first, second = (total[own[k]].sum() for own in of_ranks)
            assert abs(int(first) - int(second)) <= longest[k] - shortest[k]


def test_global_batches_hold_similar_lengths() -> None:
    stats = _stats(2048)
    total = (stats.student_length + stats.teacher_length).astype(float)
    order = DistributedBatchSampler(stats, 8, 1, 1, 1)
    within = np.mean([total[order.batch(step)].std() for step in range(order.steps_per_epoch)])
    assert within < 0.3 * total.std()


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ((9, 2, 2), r"not a multiple of --micro-batch-size 2 x 2 ranks = 4: use a global batch size of 8 or 12$"),
        ((8, 3, 2), r"global batch size of 6 or 12, or a micro-batch size that divides 4: 1, 2, 4$"),
        ((2, 4, 1), r"global batch size of 4, or a micro-batch size that divides 2: 1, 2$"),
        ((64, 1, 1), r"more than the 41 prepared samples"),
        ((8, 0, 1), r"all must be >= 1"),
    ],
)
def test_numbers_that_do_not_divide_are_refused_with_those_that_do(numbers: tuple[int, int, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DistributedBatchSampler(_stats(41), *numbers, seed=0)
