"""The order of samples: each once per epoch, the same for any number of ranks, computed directly for any position."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from data_prep.sampler import ShardSampler

CASES = [  # the shards' sample counts, streams
    ([1], 1),
    ([3], 4),
    ([7, 5, 9], 1),
    ([7, 5, 9], 3),
    ([7, 5, 9], 8),
    ([100, 1, 57, 3, 200, 64, 64, 2, 9], 4),
    ([10] * 37, 6),
    ([0, 4, 0, 3], 2),
]


def take(sampler, stream, count, start=0):
    return [sampler.sample_at(stream, position) for position in range(start, start + count)]


@pytest.mark.parametrize(("counts", "streams"), CASES)
def test_every_sample_occurs_once_per_epoch(counts, streams):
    sampler = ShardSampler(counts, 5, streams)
    total = sum(counts)
    indices = [index for stream in range(streams) for index in take(sampler, stream, 3 * total + 7)]
    occurrences = Counter((index.epoch, index.index_in_split) for index in indices)
    assert max(occurrences.values()) == 1
    for epoch in range(2):  # after three times its range no stream is in these epochs any more
        assert {number for e, number in occurrences if e == epoch} == set(range(total))


@pytest.mark.parametrize(("counts", "streams"), CASES)
def test_a_stream_reads_one_range_per_epoch_and_all_samples_in_as_many_epochs_as_streams(counts, streams):
    sampler = ShardSampler(counts, 5, streams)
    total = sum(counts)
    for stream in range(streams):
        indices = take(sampler, stream, total + 1)
        assert all(a.epoch <= b.epoch for a, b in pairwise(indices))
        assert [index.epoch for index in indices[:total]].count(streams) == 0
        assert indices[total].epoch >= streams
        lengths = Counter(index.epoch for index in indices[:total])
        for epoch in range(streams):
            range_index = (stream + epoch) % streams
            bounds = range_index * total // streams, (range_index + 1) * total // streams
            assert lengths[epoch] == bounds[1] - bounds[0]


@pytest.mark.parametrize(("counts", "streams"), CASES)
def test_the_index_in_the_shard_agrees_with_the_index_in_the_split(counts, streams):
    sampler = ShardSampler(counts, 5, streams)
    starts = np.concatenate([[0], np.cumsum(counts)])
    for index in take(sampler, streams - 1, 2 * sum(counts)):
        assert 0 <= index.index_in_shard < counts[index.shard_index]
        assert index.index_in_split == starts[index.shard_index] + index.index_in_shard


def test_any_position_is_computed_directly():
    counts, streams = CASES[5]
    sequential = [take(ShardSampler(counts, 1, streams), stream, 900) for stream in range(streams)]
    sampler = ShardSampler(counts, 1, streams)
    rng = np.random.default_rng(0)
    for _ in range(500):
        stream, position = int(rng.integers(streams)), int(rng.integers(900))
        assert sampler.sample_at(stream, position) == sequential[stream][position]


def test_the_order_depends_on_seed_and_epoch_only():
    def epoch_order(seed, epoch):
        sampler = ShardSampler([10] * 20, seed, 2)
        return [i.index_in_split for s in range(2) for i in take(sampler, s, 900) if i.epoch == epoch]

    assert epoch_order(1, 0) == epoch_order(1, 0)
    assert epoch_order(1, 0) != epoch_order(2, 0)
    assert epoch_order(1, 0) != epoch_order(1, 1)


def test_a_shuffle_buffer_mixes_a_few_shards():
    """The samples of a shard are spread over the buffer, and a buffer has few enough shards for a page cache."""
    sampler = ShardSampler([100] * 50, 0, 1)
    indices = take(sampler, 0, 5000)
    shards = [{i.shard_index for i in indices[start : start + 400]} for start in range(0, 5000, 400)]
    assert all(len(buffer_shards) <= 5 for buffer_shards in shards)
    first = [i.shard_index for i in indices[:400]]
    assert first != sorted(first)
    assert np.corrcoef(range(400), [i.index_in_split for i in indices[:400]])[0, 1] < 0.9


def test_memory_grows_with_shards_not_samples():
    """Ten million samples: only buffers are permuted, and a far position costs as much as a near one."""
    sampler = ShardSampler([1000] * 10_000, 0, 8)
    index = sampler.sample_at(3, 123_456_789)
    assert index.epoch == (123_456_789 + 3 * 10**7 // 8) * 8 // 10**7 - 3
    assert sampler.buffer_samples == 4000


def test_no_samples():
    with pytest.raises(ValueError, match="no samples"):
        ShardSampler([], 0, 1)
