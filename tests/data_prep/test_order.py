"""The order of samples: once an epoch each, the same for any number of ranks, found by arithmetic."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from data_prep.order import Order

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


def walk(order, stream, count, start=0):
    return [order.at(stream, position) for position in range(start, start + count)]


@pytest.mark.parametrize(("counts", "streams"), CASES)
def test_every_sample_once_an_epoch(counts, streams):
    order = Order(counts, 5, streams)
    samples = sum(counts)
    places = [place for stream in range(streams) for place in walk(order, stream, 3 * samples + 7)]
    seen = Counter((place.epoch, place.number) for place in places)
    assert max(seen.values()) == 1
    complete = range(2)  # epochs that no stream can still be in after three times its share
    for epoch in complete:
        assert {number for e, number in seen if e == epoch} == set(range(samples))


@pytest.mark.parametrize(("counts", "streams"), CASES)
def test_a_stream_serves_each_epochs_range_and_all_samples_in_as_many_epochs_as_streams(counts, streams):
    order = Order(counts, 5, streams)
    samples = sum(counts)
    for stream in range(streams):
        places = walk(order, stream, samples + 1)
        assert all(a.epoch <= b.epoch for a, b in pairwise(places))
        assert [p.epoch for p in places[:samples]].count(streams) == 0
        assert places[samples].epoch >= streams
        lengths = Counter(place.epoch for place in places[:samples])
        for epoch in range(streams):
            part = (stream + epoch) % streams
            bounds = part * samples // streams, (part + 1) * samples // streams
            assert lengths[epoch] == bounds[1] - bounds[0]


@pytest.mark.parametrize(("counts", "streams"), CASES)
def test_rows_and_numbers_belong_together(counts, streams):
    order = Order(counts, 5, streams)
    starts = np.concatenate([[0], np.cumsum(counts)])
    for place in walk(order, streams - 1, 2 * sum(counts)):
        assert 0 <= place.row < counts[place.shard]
        assert place.number == starts[place.shard] + place.row


def test_any_position_is_found_directly():
    counts, streams = CASES[5]
    forwards = [walk(Order(counts, 1, streams), stream, 900) for stream in range(streams)]
    order = Order(counts, 1, streams)
    rng = np.random.default_rng(0)
    for _ in range(500):
        stream, position = int(rng.integers(streams)), int(rng.integers(900))
        assert order.at(stream, position) == forwards[stream][position]


def test_seeds_and_epochs_differ_and_seeds_repeat():
    def line(seed, epoch):
        order = Order([10] * 20, seed, 2)
        return [p.number for s in range(2) for p in walk(order, s, 900) if p.epoch == epoch]

    assert line(1, 0) == line(1, 0)
    assert line(1, 0) != line(2, 0)
    assert line(1, 0) != line(1, 1)


def test_a_window_mixes_a_few_shards():
    """Samples of one shard are spread over the window, and the window's shards are few: what a cache can hold."""
    order = Order([100] * 50, 0, 1)
    places = walk(order, 0, 5000)
    shards = [{p.shard for p in places[start : start + 400]} for start in range(0, 5000, 400)]
    assert all(len(window) <= 5 for window in shards)
    assert [p.shard for p in places[:400]] != sorted(p.shard for p in places[:400])
    assert np.corrcoef(range(400), [p.number for p in places[:400]])[0, 1] < 0.9


def test_memory_grows_with_shards_not_samples():
    """Ten million samples: only windows are permuted, and far positions cost what near ones do."""
    order = Order([1000] * 10_000, 0, 8)
    place = order.at(3, 123_456_789)
    assert place.epoch == (123_456_789 + 3 * 10**7 // 8) * 8 // 10**7 - 3
    assert order.window == 4000


def test_no_samples():
    with pytest.raises(ValueError, match="no samples"):
        Order([], 0, 1)
