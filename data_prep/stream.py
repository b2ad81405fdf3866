"""Tars (+ edge tars + masks) -> training batches.

A batch is a pure function of (arguments, step): the position of a training is one integer, resuming is arithmetic, and
the ranks' parts put end to end are the same global batch for any number of ranks and threads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import cv2
import numpy as np

from data_prep.canny import canny_edges, load_edges
from data_prep.masks import open_masks
from data_prep.order import Order, Place
from data_prep.shards import SPLITS, decode_sample, load_manifest, read_index
from data_prep.storage import Storage, open_storage

AHEAD = 2  # batches that are made while one is used
_CACHED_INDEXES = 64  # shards whose index stays in memory

Batch = dict[str, Any]


class Stream:
    """Batches of one split for one rank.

    Global batch b holds `batch` samples: the next batch / streams of each of the `streams` lines of `Order`, the lines
    in turn. Rank r of `world` makes the part of the lines r * streams / world and on. Epochs follow one another without
    a gap, so every batch is full, also when the split is smaller than one.

    A sample's crop (of `size` pixels), flip, sigma and mask come from a generator seeded by (seed, epoch, its number in
    the split). `masks` is what `open_masks` takes. Edges: "full" reads the side tars `edges[sigma]` of a sigma
    drawn from `sigmas`; "masked" runs Canny on the crop with the hole masked out; "none" gives none. With `cache_dir`
    the tars of a bucket are downloaded there once; without it each sample is one ranged read.

    ValueError, naming the field, for an empty split, sizes that do not divide, or edges that do not fit.
    """

    def __init__(
        self,
        shards: Storage,
        split: str,
        *,
        size: int,
        batch: int,
        masks: str | Mapping[str, Any],
        seed: int = 0,
        streams: int = 1,
        rank: int = 0,
        world: int = 1,
        flip: bool = True,
        edges: Mapping[float, Storage] | None = None,
        edge_source: Literal["full", "masked", "none"] = "none",
        sigmas: Sequence[float] = (2.0,),
        threads: int = 1,
        cache_dir: Path | None = None,
    ) -> None:
        if streams < 1 or streams % world or not 0 <= rank < world:
            raise ValueError(f"data.streams = {streams} must be a multiple of the number of ranks ({world})")
        if batch < 1 or batch % streams:
            raise ValueError(f"train.batch = {batch} must be a multiple of data.streams = {streams}")
        manifest = load_manifest(shards)
        entries = _entries(manifest, split, shards.uri)
        _check_size(manifest, size, shards.uri)
        self.size, self.seed, self.flip, self.threads = size, seed, flip, threads
        self.edge_source, self.sigmas = edge_source, tuple(sigmas)
        self.order = Order([entry["count"] for entry in entries], seed, streams)
        self.samples = self.order.samples
        self.each = batch // streams
        self.lines = range(rank * streams // world, (rank + 1) * streams // world)
        self.masks = open_masks(masks)
        self.masks.draw(size, size, np.random.default_rng(0))  # what is made once a process is made here
        self.photos = _Tars(shards, entries, cache_dir)
        self.edge_maps: dict[float, _Tars] = {}
        if edge_source not in ("full", "masked", "none"):
            raise ValueError(f"edges.source = {edge_source!r}: full, masked or none")
        if edge_source != "none" and not self.sigmas:
            raise ValueError(f"edges.sigma is empty: edges.source = {edge_source} needs one at least")
        for sigma in self.sigmas if edge_source == "full" else ():
            if sigma not in (edges or {}):
                raise ValueError(f"edges.sigma: no edge maps of sigma {sigma:g} were given; make them first")
            self.edge_maps[sigma] = _Tars(*_edge_entries((edges or {})[sigma], entries, manifest), cache_dir)

    def batch(self, step: int) -> Batch:
        """This rank's part of global batch `step` (0, 1, ...).

        {"image": float32 [b,3,S,S] in [0,1], "mask": float32 [b,1,S,S] with 1 = hole,
        "edge": float32 [b,1,S,S] or None, "keys": [(epoch, key)]}. Edges are not multiplied by the mask.
        """
        batch, places = self._begin(step)
        self._fill(batch, places, range(len(places)))
        return batch

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """batch(start) ... batch(stop - 1), made ahead by `threads` threads."""
        with ThreadPoolExecutor(self.threads, thread_name_prefix="stream") as pool:
            waiting: deque[tuple[Batch, list[Future[None]]]] = deque()
            step = start
            try:
                while waiting or step < stop:
                    while step < stop and len(waiting) <= AHEAD:
                        batch, places = self._begin(step)
                        shares = [range(n, len(places), self.threads) for n in range(self.threads)]
                        waiting.append((batch, [pool.submit(self._fill, batch, places, n) for n in shares]))
                        step += 1
                    batch, work = waiting.popleft()
                    for future in work:
                        future.result()
                    yield batch
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _begin(self, step: int) -> tuple[Batch, list[Place]]:
        """An empty batch, and what belongs in it."""
        first = step * self.each
        places = [self.order.at(line, n) for line in self.lines for n in range(first, first + self.each)]
        plane = len(places), 1, self.size, self.size
        batch = {
            "image": np.empty((len(places), 3, self.size, self.size), np.float32),
            "mask": np.empty(plane, np.float32),
            "edge": None if self.edge_source == "none" else np.empty(plane, np.float32),
            "keys": [(0, "")] * len(places),
        }
        return batch, places

    def _fill(self, batch: Batch, places: Sequence[Place], numbers: range) -> None:
        for number in numbers:
            self._make(batch, number, places[number])

    def _make(self, batch: Batch, number: int, place: Place) -> None:
        """Make one sample in its place of the batch. The draws' order is part of the stream's definition."""
        key, data = self.photos.read(place.shard, place.row)
        photo = decode_sample(data)
        rng = np.random.default_rng((self.seed, place.epoch, place.number))
        top, left = (int(rng.integers(length - self.size + 1)) for length in photo.shape[:2])
        mirrored = bool(rng.random() < 0.5) and self.flip
        sigma = self.sigmas[int(rng.integers(len(self.sigmas)))] if self.sigmas else 0.0
        mask = self.masks.draw(self.size, self.size, rng)

        def cut(image: np.ndarray) -> np.ndarray:
            crop = image[top : top + self.size, left : left + self.size]
            return crop[:, ::-1] if mirrored else crop

        crop = cut(photo)
        np.multiply(
            crop.transpose(2, 0, 1), np.float32(1 / 255), out=batch["image"][number], casting="unsafe"
        )
        batch["mask"][number, 0] = mask
        if self.edge_source == "full":
            batch["edge"][number, 0] = cut(self._stored_edges(sigma, place, key)) != 0
        elif self.edge_source == "masked":
            batch["edge"][number, 0] = canny_edges(np.ascontiguousarray(crop), sigma, mask)
        batch["keys"][number] = place.epoch, key

    def _stored_edges(self, sigma: float, place: Place, key: str) -> np.ndarray:
        same, data = self.edge_maps[sigma].read(place.shard, place.row)
        if same != key:
            raise ValueError(
                f"the edge maps of sigma {sigma:g} are not in the photographs' order: make them again"
            )
        edges = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE)
        if edges is None:
            raise ValueError(f"an edge map of sigma {sigma:g} cannot be decoded: make the edges again")
        return edges


class _Tars:
    """Samples of a split's tars by (shard, row): one positioned read each."""

    def __init__(self, storage: Storage, entries: Sequence[dict[str, Any]], cache_dir: Path | None) -> None:
        self.storage, self.entries = storage, entries
        local = storage.path() is not None
        self.cache = None if local or cache_dir is None else open_storage(cache_dir)
        self.indexes: dict[int, dict[str, list]] = {}
        self.lock = Lock()

    def read(self, shard: int, row: int) -> tuple[str, bytes]:
        """(key, encoded bytes)."""
        index = self._index(shard)
        name, home = self.entries[shard]["name"], self.storage
        if self.cache is not None:
            name, home = f"{self.entries[shard]['sha256']}.tar", self.cache
        return index["keys"][row], home.read_range(name, index["offsets"][row], index["sizes"][row])

    def _index(self, shard: int) -> dict[str, list]:
        """The shard's index; its tar is downloaded with it when there is a cache."""
        found = self.indexes.get(shard)
        if found is not None:
            return found
        with self.lock:
            if shard not in self.indexes:
                entry = self.entries[shard]
                if self.cache is not None and self.cache.size(f"{entry['sha256']}.tar") != entry["bytes"]:
                    path = self.cache.path(f"{entry['sha256']}.tar")
                    assert path is not None
                    self.storage.download(entry["name"], path)
                index = read_index(self.storage, entry["name"])
                if len(self.indexes) >= _CACHED_INDEXES:
                    self.indexes.pop(next(iter(self.indexes)))
                self.indexes[shard] = index
            return self.indexes[shard]


def _entries(manifest: Mapping[str, Any], split: str, uri: str) -> list[dict[str, Any]]:
    if split not in SPLITS:
        raise ValueError(f"split {split!r}: {', '.join(SPLITS)}")
    entries = [entry for entry in manifest["shards"] if entry["split"] == split]
    if not entries:
        raise ValueError(f"the split {split} of {uri} holds no photographs; give more, or raise data.{split}")
    return entries


def _edge_entries(
    edges: Storage, photos: Sequence[dict[str, Any]], manifest: Mapping[str, Any]
) -> tuple[Storage, list[dict[str, Any]]]:
    """The edge tars of these photographs' tars, in the same order."""
    known = {entry["name"]: entry for entry in load_edges(edges, manifest["digest"])["shards"]}
    missing = [entry["name"] for entry in photos if entry["name"] not in known]
    if missing:
        raise ValueError(f"the edges in {edges.uri} lack {missing[0]}: make them again")
    return edges, [known[entry["name"]] for entry in photos]


def _check_size(manifest: Mapping[str, Any], size: int, uri: str) -> None:
    stored = manifest["options"]["size"] + manifest["options"]["margin"]
    if not 0 < size <= stored:
        raise ValueError(
            f"data.size = {size}: the photographs in {uri} are {stored} pixels on the short side"
        )


def read_split(
    shards: Storage, split: str, size: int, cache_dir: Path | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """(key, centre crop uint8 [size,size,3]) of every photograph of a split, in the manifest's order."""
    manifest = load_manifest(shards)
    entries = _entries(manifest, split, shards.uri)
    _check_size(manifest, size, shards.uri)
    tars = _Tars(shards, entries, cache_dir)
    for shard, entry in enumerate(entries):
        for row in range(entry["count"]):
            key, data = tars.read(shard, row)
            photo = decode_sample(data)
            top, left = ((length - size) // 2 for length in photo.shape[:2])
            yield key, photo[top : top + size, left : left + size]
