"""The order of samples: a pure function of (seed, position), the same for any number of ranks and threads.

In epoch e the shards are permuted by (seed, e) and their N samples concatenated; this sequence is divided into C equal
ranges, one per stream; each range is shuffled within buffers of a few shards. Stream c reads range c in epoch 0, range
c + 1 in epoch 1 and so on, modulo C: after C epochs each stream has read exactly N samples.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

SHUFFLE_BUFFER_SHARDS = 4  # as many as a worker's page cache holds; samples are shuffled only among them
_SHARD_ORDER, _BUFFER_ORDER = 1, 2  # keep the seeds of the two kinds of permutation apart


class SampleIndex(NamedTuple):
    """A sample of an epoch."""

    epoch: int
    shard_index: int
    index_in_shard: int
    index_in_split: int
    """in the manifest's order"""


def find_segment(ends: np.ndarray, position: int) -> tuple[int, int]:
    """(segment, offset in it) of a position in concatenated segments that end at `ends`; empty segments hold none."""
    segment = int(np.searchsorted(ends, position, side="right"))
    return segment, int(position) - (int(ends[segment - 1]) if segment else 0)


class ShardSampler:
    """`counts` are the shards' sample counts, `streams` is C. Raises ValueError when there are no samples."""

    def __init__(self, counts: Sequence[int], seed: int, streams: int) -> None:
        self.counts = np.asarray(counts, np.int64)
        self.num_samples = int(self.counts.sum())
        if self.num_samples == 0:
            raise ValueError("no samples to order")
        self.seed, self.streams = seed, streams
        self.shard_starts = np.concatenate([[0], np.cumsum(self.counts)])
        self.buffer_samples = SHUFFLE_BUFFER_SHARDS * -(-self.num_samples // len(counts))
        # memory: the shard orders of a few epochs and two buffers per stream
        self._epoch_order = functools.lru_cache(maxsize=4)(self._make_epoch_order)
        self._buffer_order = functools.lru_cache(maxsize=2 * streams + 2)(self._make_buffer_order)

    def sample_at(self, stream: int, position: int) -> SampleIndex:
        """The sample at `position` (0, 1, ...) of a stream, which never ends.

        Range k begins at floor(k N / C). As a stream's ranges follow one another, stream c is at
        t = position + floor(c N / C) of the endless sequence of ranges 0, 1, ... C - 1, 0, ...: in its k-th range,
        where k is the last that begins at or before t.
        """
        epoch, range_index, start, buffer, offset, size = self._find_buffer(stream, position)
        shuffled_offset = int(self._buffer_order(epoch, range_index, buffer, size)[offset])
        shards, ends = self._epoch_order(epoch)
        order_index, index_in_shard = find_segment(
            ends, start + buffer * self.buffer_samples + shuffled_offset
        )
        shard = int(shards[order_index])
        return SampleIndex(epoch, shard, index_in_shard, int(self.shard_starts[shard]) + index_in_shard)

    def shards_in_buffer(self, stream: int, position: int) -> list[int]:
        """The shards that the shuffle buffer of a position contains."""
        epoch, _, start, buffer, _, size = self._find_buffer(stream, position)
        shards, ends = self._epoch_order(epoch)
        first = start + buffer * self.buffer_samples
        begin, end = np.searchsorted(ends, [first, first + size - 1], side="right").tolist()
        return [int(shards[n]) for n in range(begin, end + 1) if self.counts[shards[n]]]

    def next_in_manifest(self, index: SampleIndex) -> SampleIndex:
        """The next sample in the manifest's order; it replaces one that cannot be read."""
        index_in_split = (index.index_in_split + 1) % self.num_samples
        return SampleIndex(index.epoch, *find_segment(self.shard_starts[1:], index_in_split), index_in_split)

    def _find_buffer(self, stream: int, position: int) -> tuple[int, int, int, int, int, int]:
        """(epoch, range, start of the range, buffer in the range, offset in the buffer, size of the buffer)."""
        n, c = self.num_samples, self.streams
        t = position + stream * n // c
        k = ((t + 1) * c - 1) // n
        start = (k % c) * n // c
        length = (k % c + 1) * n // c - start
        buffer, offset = divmod(t - k * n // c, self.buffer_samples)
        size = min(self.buffer_samples, length - buffer * self.buffer_samples)
        return k - stream, k % c, start, buffer, offset, size

    def _make_epoch_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(the epoch's permutation of the shards, where each one's samples end in the concatenation)."""
        shards = np.random.default_rng((self.seed, _SHARD_ORDER, epoch)).permutation(len(self.counts))
        return shards, np.cumsum(self.counts[shards])

    def _make_buffer_order(self, epoch: int, range_index: int, buffer: int, size: int) -> np.ndarray:
        return np.random.default_rng((self.seed, _BUFFER_ORDER, epoch, range_index, buffer)).permutation(size)


def random_bits(seed: int, indices: Sequence[SampleIndex]) -> list[list[int]]:
    """Four 64-bit numbers per sample, for its top, left, flip and sigma: SplitMix64 of (seed, epoch, index_in_split).

    Computed for all samples at once: one generator per sample would cost more than everything else but decoding.
    """
    state: np.ndarray = np.full(len(indices), seed, np.uint64)
    for column in ([index.epoch for index in indices], [index.index_in_split for index in indices]):
        state = _splitmix64(state + _SPLITMIX_GAMMA) ^ np.array(column, np.int64).view(np.uint64)
    return _splitmix64(state[:, None] + _SPLITMIX_GAMMA * np.arange(1, 5, dtype=np.uint64)).tolist()


_SPLITMIX_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def _splitmix64(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
