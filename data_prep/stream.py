"""Tars (+ edge tars + masks) -> training batches.

A batch is a pure function of (arguments, step): the position of a training run is one integer, resuming is arithmetic,
and the ranks' slices concatenated are the same global batch for any number of ranks and threads.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from threading import Lock
from typing import Any, Literal

import cv2
import numpy as np

from data_prep.cache import ShardCache
from data_prep.canny import canny_edges
from data_prep.edge_maps import EdgeTarEntry, decode_edges, load_edge_manifest
from data_prep.manifest import SPLITS, Manifest, ShardEntry, load_manifest
from data_prep.masks import open_masks
from data_prep.preprocess import make_sample_decoder
from data_prep.sampler import SampleIndex, ShardSampler, random_bits
from data_prep.shards import empty_split_message
from data_prep.storage import Storage
from data_prep.tars import TarReader, UnreadableSample

PREFETCH_BATCHES = 2
EDGE_SOURCES = ("full", "live", "masked", "none")


@dataclass(frozen=True, eq=False)
class Batch:
    """A rank's slice of a global batch, b samples of S x S pixels. As bytes, a quarter of the size of the floats that
    the learner converts them to on its device."""

    image: np.ndarray
    """uint8 [b,S,S,3], RGB"""
    mask: np.ndarray
    """uint8 [b,S,S], 1 = hole"""
    edge: np.ndarray | None
    """bool [b,S,S], not multiplied by the mask; None without edges"""
    keys: list[tuple[int, str]]
    """(epoch, the photograph's key) of each sample"""
    rank_slice: range
    """indices of these samples in the global batch"""
    global_size: int
    """samples of the global batch"""

    def as_dict(self) -> dict[str, Any]:
        """The batch as the learner takes it, with the fields' names as keys."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


class TooManyUnreadable(ValueError):
    """More samples are unreadable than the recipe allows; the message lists them."""


class BatchStream:
    """Batches of one split for one rank.

    A global batch holds `batch_size` samples: the next batch_size / streams of each of the `streams` streams of
    ShardSampler, in their order. Rank r of `world_size` loads the r-th of `world_size` slices of it, whose sizes are
    equal or differ by one; when `streams` is a multiple of `world_size`, a rank reads whole streams. Epochs follow
    without a gap, so every batch is full, even if the split is smaller than a batch.

    A sample's crop (of `size` pixels), flip, sigma and mask depend only on (seed, epoch, its index in the split).
    `masks` and `scan_cache` are the arguments of `open_masks`. Edges: "full" reads the edge tars `edges[sigma]` of a
    sigma chosen at random from `sigmas`; "live" computes the same edges from the stored photograph; "masked" runs Canny
    on the crop with the hole masked out; "none" gives none. With `cache`, the tars of a bucket are downloaded, those of
    the next shuffle buffer in advance; without it each sample is one ranged read.

    A sample that stays unreadable after retries is recorded in `unreadable`, and the next readable sample of the
    manifest replaces it, the same one on every rank. More than `max_unreadable` of them raise TooManyUnreadable.

    Raises ValueError, naming the recipe's field, for an empty split, sizes that do not divide, or edges that do not
    match.
    """

    def __init__(
        self,
        shards: Storage,
        split: str,
        *,
        size: int,
        batch_size: int,
        masks: str | Mapping[str, Any],
        seed: int = 0,
        streams: int = 1,
        rank: int = 0,
        world_size: int = 1,
        flip: bool = True,
        edges: Mapping[float, Storage] | None = None,
        edge_source: Literal["full", "live", "masked", "none"] = "none",
        sigmas: Sequence[float] = (2.0,),
        threads: int = 1,
        cache: ShardCache | None = None,
        max_unreadable: int = 0,
        scan_cache: Storage | None = None,
    ) -> None:
        if streams < 1 or batch_size < 1 or batch_size % streams:
            raise ValueError(f"train.batch = {batch_size} must be a multiple of data.streams = {streams}")
        if world_size > batch_size or not 0 <= rank < world_size:
            raise ValueError(
                f"train.batch = {batch_size}: {world_size} workers need a photograph each in every batch"
            )
        manifest = load_manifest(shards)
        entries = _split_entries(manifest, split, shards.uri)
        _check_crop_size(manifest, size, shards.uri)
        self.size, self.seed, self.flip, self.threads = size, seed, flip, threads
        self.edge_source, self.sigmas = edge_source, tuple(sigmas)
        self.sampler = ShardSampler([entry.count for entry in entries], seed, streams)
        self.num_samples = self.sampler.num_samples
        self.samples_per_stream = batch_size // streams
        self.global_batch_size = batch_size
        self.rank_slice = range(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)
        self.masks = open_masks(masks, scan_cache)
        # also fills the caches of mask patterns now, before there are threads
        first_mask = self.masks.sample(size, size, np.random.default_rng(0))
        self.constant_mask = first_mask if self.masks.is_constant else None
        self.photo_tars = TarReader(shards, entries, cache)
        self.decode = make_sample_decoder(manifest.options)
        self.max_unreadable, self.unreadable, self._lock = max_unreadable, dict[str, str](), Lock()
        self.edge_tars: dict[float, TarReader] = {}
        if edge_source not in EDGE_SOURCES:
            raise ValueError(f"edges.mode = {edge_source!r}: {', '.join(EDGE_SOURCES)}")
        if edge_source != "none" and not self.sigmas:
            raise ValueError(f"edges.sigma is empty: edges.mode = {edge_source} needs at least one")
        for sigma in self.sigmas if edge_source == "full" else ():
            if sigma not in (edges or {}):
                raise ValueError(f"edges.sigma: no edge maps of sigma {sigma:g} were given; make them first")
            self.edge_tars[sigma] = TarReader(
                *_match_edge_entries((edges or {})[sigma], entries, manifest), cache
            )
        self._prefetched: dict[int, list[int]] = {}

    def batch_at(self, step: int) -> Batch:
        """This rank's slice of global batch `step` (0, 1, ...)."""
        batch = self._empty_batch()
        self._fill_batch(batch, step, range(len(self.rank_slice)))
        return batch

    def iter_batches(self, start: int, stop: int) -> Iterator[Batch]:
        """batch_at(start) ... batch_at(stop - 1), loaded in advance by `threads` threads."""
        with ThreadPoolExecutor(self.threads, thread_name_prefix="stream") as pool:
            pending: deque[tuple[Batch, list[Future[None]]]] = deque()
            step = start
            try:
                while pending or step < stop:
                    while step < stop and len(pending) <= PREFETCH_BATCHES:
                        batch = self._empty_batch()
                        rows_per_thread = [
                            range(n, len(self.rank_slice), self.threads) for n in range(self.threads)
                        ]
                        pending.append(
                            (batch, [pool.submit(self._fill_batch, batch, step, n) for n in rows_per_thread])
                        )
                        step += 1
                    batch, futures = pending.popleft()
                    for future in futures:
                        future.result()
                    yield batch
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
                if self.photo_tars.cache:
                    self.photo_tars.cache.stop_prefetch()

    def _empty_batch(self) -> Batch:
        shape = len(self.rank_slice), self.size, self.size
        return Batch(
            image=np.empty((*shape, 3), np.uint8),
            mask=np.empty(shape, np.uint8),
            edge=None if self.edge_source == "none" else np.empty(shape, bool),
            keys=[(0, "")] * len(self.rank_slice),
            rank_slice=self.rank_slice,
            global_size=self.global_batch_size,
        )

    def _fill_batch(self, batch: Batch, step: int, rows: range) -> None:
        """Load these rows of this rank's slice of global batch `step`."""
        if self.photo_tars.cache:
            self._prefetch_shards(step)
        per_stream = self.samples_per_stream
        positions = [self.rank_slice[row] for row in rows]
        indices = [
            self.sampler.sample_at(n // per_stream, step * per_stream + n % per_stream) for n in positions
        ]
        for row, index, bits in zip(rows, indices, random_bits(self.seed, indices), strict=True):
            while not self._load_sample(batch, row, index, bits):
                index = self.sampler.next_in_manifest(index)
                (bits,) = random_bits(self.seed, [index])

    def _prefetch_shards(self, step: int) -> None:
        """Download the tars of the current and the next shuffle buffer of each stream that this rank reads."""
        for stream in sorted({position // self.samples_per_stream for position in self.rank_slice}):
            position = step * self.samples_per_stream
            upcoming = self.sampler.shards_in_buffer(stream, position) + self.sampler.shards_in_buffer(
                stream, position + self.sampler.buffer_samples
            )
            if upcoming != self._prefetched.get(stream):
                self._prefetched[stream] = upcoming
                for tars in (self.photo_tars, *self.edge_tars.values()):
                    tars.prefetch(upcoming)

    def _load_sample(self, batch: Batch, row: int, index: SampleIndex, bits: list[int]) -> bool:
        """Load one sample into a row of the batch; False if it is unreadable."""
        try:
            key, photo = self._read_photo(index)
            sigma = self.sigmas[bits[3] % len(self.sigmas)] if self.sigmas else 0.0
            edges = self._full_edges(sigma, index, key, photo)
        except UnreadableSample as error:
            self._count_unreadable(error)
            return False
        size, (height, width) = self.size, photo.shape[:2]
        top, left = bits[0] % (height - size + 1), bits[1] % (width - size + 1)
        mirrored = self.flip and bits[2] % 2 == 1

        def copy_crop(source: np.ndarray, target: np.ndarray) -> None:
            crop = source[top : top + size, left : left + size]
            if mirrored:
                cv2.flip(crop, 1, dst=target)  # NumPy would copy pixel by pixel
            else:
                np.copyto(target, crop)

        image, mask = batch.image[row], self.constant_mask
        copy_crop(photo, image)
        if mask is None:
            rng = np.random.default_rng((self.seed, index.epoch, index.index_in_split))
            mask = self.masks.sample(size, size, rng)
        batch.mask[row] = mask
        if batch.edge is not None:
            if edges is not None:
                copy_crop(edges.view(np.uint8), batch.edge[row].view(np.uint8))
            else:  # "masked"
                batch.edge[row] = canny_edges(image, sigma, mask)
        batch.keys[row] = index.epoch, key
        return True

    def _read_photo(self, index: SampleIndex) -> tuple[str, np.ndarray]:
        key, data = self.photo_tars.read(index.shard_index, index.index_in_shard)
        try:
            return key, self.decode(data)
        except ValueError as error:
            name = f"{self.photo_tars.entries[index.shard_index].name} {key}"
            raise UnreadableSample(name, str(error)) from error

    def _full_edges(self, sigma: float, index: SampleIndex, key: str, photo: np.ndarray) -> np.ndarray | None:
        """The edges of the uncropped photograph as 0 and 1, for edge sources "full" and "live"; else None."""
        if self.edge_source == "live":
            return canny_edges(photo, sigma)
        if self.edge_source != "full":
            return None
        tars = self.edge_tars[sigma]
        edge_key, data = tars.read(index.shard_index, index.index_in_shard)
        if edge_key != key:
            raise ValueError(
                f"the edge maps of sigma {sigma:g} are not in the photographs' order: rebuild them"
            )
        try:
            edges = decode_edges(data)
        except ValueError as error:
            name = f"{tars.entries[index.shard_index].name} {key} of sigma {sigma:g}"
            raise UnreadableSample(name, str(error)) from error
        if edges.shape != photo.shape[:2]:
            raise ValueError(f"the edge maps of sigma {sigma:g} are of other photographs: rebuild them")
        return edges

    def _count_unreadable(self, error: UnreadableSample) -> None:
        """Record and print a sample once. Raises TooManyUnreadable above the limit."""
        with self._lock:
            if error.name not in self.unreadable:
                print(f"skipped an unreadable sample: {error}", file=sys.stderr, flush=True)
            self.unreadable[error.name] = str(error)
            count = len(self.unreadable)
            if count > self.max_unreadable:
                listed = "; ".join(list(self.unreadable.values())[:5])
                more = f" and {count - 5} more" if count > 5 else ""
                raise TooManyUnreadable(
                    f"{count} samples cannot be read, more than data.max_unreadable_fraction allows: "
                    f"{listed}{more}; "
                    "`inpaint data check` lists all, and rebuilds them with --repair"
                )


def _split_entries(manifest: Manifest, split: str, uri: str) -> list[ShardEntry]:
    if split not in SPLITS:
        raise ValueError(f"split {split!r}: {', '.join(SPLITS)}")
    entries = manifest.shards_of_split(split)
    if not entries:
        raise ValueError(empty_split_message(split, uri))
    return entries


def _match_edge_entries(
    edges: Storage, photos: Sequence[ShardEntry], manifest: Manifest
) -> tuple[Storage, list[EdgeTarEntry]]:
    """The edge tars of these photograph tars, in the same order."""
    edge_entries = {entry.name: entry for entry in load_edge_manifest(edges, manifest.digest).shards}
    missing = [entry.name for entry in photos if entry.name not in edge_entries]
    if missing:
        raise ValueError(f"the edges in {edges.uri} lack {missing[0]}: rebuild them")
    return edges, [edge_entries[entry.name] for entry in photos]


def _check_crop_size(manifest: Manifest, size: int, uri: str) -> None:
    stored = manifest.options.size + manifest.options.margin
    if not 0 < size <= stored:
        raise ValueError(
            f"data.size = {size}: the photographs in {uri} are {stored} pixels on the short side"
        )


def read_split(shards: Storage, split: str, size: int) -> Iterator[tuple[str, np.ndarray]]:
    """(key, centre crop uint8 [size,size,3]) of every photograph of a split, in the manifest's order."""
    manifest = load_manifest(shards)
    entries = _split_entries(manifest, split, shards.uri)
    _check_crop_size(manifest, size, shards.uri)
    tars, decode = TarReader(shards, entries), make_sample_decoder(manifest.options)
    for shard_index, entry in enumerate(entries):
        for index_in_shard in range(entry.count):
            key, data = tars.read(shard_index, index_in_shard)
            photo = decode(data)
            top, left = ((length - size) // 2 for length in photo.shape[:2])
            yield key, photo[top : top + size, left : left + size]
