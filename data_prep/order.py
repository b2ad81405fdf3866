"""The order of samples: a pure function of (seed, position), indifferent to how many ranks and workers read it.

Epoch e: the shards, permuted by (seed, e), lay their N samples end to end on a line; the line is cut in C equal ranges;
each range is permuted within windows of a few shards. Stream c reads range c in epoch 0, c + 1 in epoch 1, and so on
round: after C epochs each stream has read exactly N samples.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

WINDOW = 4  # shards: what a worker's page cache holds, and what a sample is mixed with inside one epoch
_SHARDS, _WINDOW = 1, 2  # purposes of the generators


class Place(NamedTuple):
    """A sample of an epoch: row `row` of shard `shard`, number `number` of the split in the manifest's order."""

    epoch: int
    shard: int
    row: int
    number: int


def locate(ends: np.ndarray, point: int) -> tuple[int, int]:
    """(which part, place in it) of a point on a line of parts that end at `ends`; empty parts hold none."""
    part = int(np.searchsorted(ends, point, side="right"))
    return part, int(point) - (int(ends[part - 1]) if part else 0)


class Order:
    """`counts` are the shards' sample counts, `streams` is C. ValueError when there is no sample."""

    def __init__(self, counts: Sequence[int], seed: int, streams: int) -> None:
        self.counts = np.asarray(counts, np.int64)
        self.samples = int(self.counts.sum())
        if self.samples == 0:
            raise ValueError("no samples to order")
        self.seed, self.streams = seed, streams
        self.starts = np.concatenate([[0], np.cumsum(self.counts)])
        self.window = WINDOW * -(-self.samples // len(counts))
        # memory: one epoch's shards, twice, and two windows a stream
        self._line = functools.lru_cache(maxsize=4)(self._make_line)
        self._mixed = functools.lru_cache(maxsize=2 * streams + 2)(self._make_mixed)

    def at(self, stream: int, position: int) -> Place:
        """The sample at `position` (0, 1, ...) of a stream's endless line.

        Range k begins at floor(k N / C). As the streams' ranges follow one another, stream c is at the point
        t = position + floor(c N / C) of one endless line of ranges 0, 1, ... C - 1, 0, ...: in the k-th of them,
        with k the last that begins at t or before.
        """
        epoch, part, start, window, within, size = self._window(stream, position)
        point = start + window * self.window + int(self._mixed(epoch, part, window, size)[within])
        shards, ends = self._line(epoch)
        turn, row = locate(ends, point)
        shard = int(shards[turn])
        return Place(epoch, shard, row, int(self.starts[shard]) + row)

    def shards_near(self, stream: int, position: int) -> list[int]:
        """The shards that the window of a position draws from."""
        epoch, _, start, window, _, size = self._window(stream, position)
        shards, ends = self._line(epoch)
        first, last = start + window * self.window, start + window * self.window + size - 1
        begin, end = np.searchsorted(ends, [first, last], side="right").tolist()
        return [int(shards[turn]) for turn in range(begin, end + 1) if self.counts[shards[turn]]]

    def following(self, place: Place) -> Place:
        """The next sample in the manifest's order, which stands in for one that cannot be read."""
        number = (place.number + 1) % self.samples
        return Place(place.epoch, *locate(self.starts[1:], number), number)

    def _window(self, stream: int, position: int) -> tuple[int, int, int, int, int, int]:
        """(epoch, range, its first point, window of it, position in the window, the window's size)."""
        n, c = self.samples, self.streams
        t = position + stream * n // c
        k = ((t + 1) * c - 1) // n
        start = (k % c) * n // c
        length = (k % c + 1) * n // c - start
        window, within = divmod(t - k * n // c, self.window)
        return k - stream, k % c, start, window, within, min(self.window, length - window * self.window)

    def _make_line(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's shards in order, and where each one's samples end on the line."""
        shards = np.random.default_rng((self.seed, _SHARDS, epoch)).permutation(len(self.counts))
        return shards, np.cumsum(self.counts[shards])

    def _make_mixed(self, epoch: int, part: int, window: int, size: int) -> np.ndarray:
        return np.random.default_rng((self.seed, _WINDOW, epoch, part, window)).permutation(size)
