"""Tars (+ edge tars + masks) -> training batches.

A batch is a pure function of (arguments, step): the position of a training is one integer, resuming is arithmetic, and
the ranks' parts put end to end are the same global batch for any number of ranks and threads.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import Any, Literal

import cv2
import numpy as np

from data_prep.cache import ShardCache
from data_prep.canny import canny_edges, decode_edges, load_edges
from data_prep.masks import open_masks
from data_prep.order import Order, Place
from data_prep.preparing import sample_decoder
from data_prep.reading import BadSample, Tars
from data_prep.shards import SPLITS, load_manifest
from data_prep.storage import Storage

AHEAD = 2  # batches that are made while one is used
EDGE_SOURCES = ("full", "live", "masked", "none")

Batch = dict[str, Any]


class TooManyBad(ValueError):
    """More samples cannot be read than the recipe accepts; the message lists them."""


class Stream:
    """Batches of one split for one rank.

    Global batch b holds `batch` samples: the next batch / streams of each of the `streams` lines of `Order`, the lines
    in turn. Rank r of `world` makes the r-th of `world` parts of it, which are equal or differ by one: whole lines,
    where `streams` is a multiple of `world`. Epochs follow one another without a gap, so every batch is full, also when
    the split is smaller than one.

    A sample's crop (of `size` pixels), flip, sigma and mask are drawn from (seed, epoch, its number in the split) alone.
    `masks` is what `open_masks` takes. Edges: "full" reads the side tars `edges[sigma]` of a sigma
    drawn from `sigmas`; "live" computes the same from the stored photograph; "masked" runs Canny on the crop with the
    hole masked out; "none" gives none. The tars of a bucket are read from `cache`, into which
    those of the next window are fetched ahead; without it each sample is one ranged read.

    A sample that cannot be read or decoded, after some tries, is named in `bad`, and the next one of its shard stands
    in for it: the same one whoever reads. More than `max_bad` of them raise TooManyBad.

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
        edge_source: Literal["full", "live", "masked", "none"] = "none",
        sigmas: Sequence[float] = (2.0,),
        threads: int = 1,
        cache: ShardCache | None = None,
        max_bad: int = 0,
    ) -> None:
        if streams < 1 or batch < 1 or batch % streams:
            raise ValueError(f"train.batch = {batch} must be a multiple of data.streams = {streams}")
        if world > batch or not 0 <= rank < world:
            raise ValueError(f"train.batch = {batch}: {world} workers need a photograph each in every batch")
        manifest = load_manifest(shards)
        entries = _entries(manifest, split, shards.uri)
        _check_size(manifest, size, shards.uri)
        self.size, self.seed, self.flip, self.threads = size, seed, flip, threads
        self.edge_source, self.sigmas = edge_source, tuple(sigmas)
        self.order = Order([entry["count"] for entry in entries], seed, streams)
        self.samples = self.order.samples
        self.each = batch // streams
        self.whole = batch
        self.part = range(rank * batch // world, (rank + 1) * batch // world)
        self.masks = open_masks(masks)
        first = self.masks.draw(
            size, size, np.random.default_rng(0)
        )  # what is made once a process is made here
        self.mask = first if self.masks.constant else None
        self.photos = Tars(shards, entries, cache)
        self.decode = sample_decoder(manifest)
        self.max_bad, self.bad, self._lock = max_bad, dict[str, str](), Lock()
        self.edge_maps: dict[float, Tars] = {}
        if edge_source not in EDGE_SOURCES:
            raise ValueError(f"edges.source = {edge_source!r}: {', '.join(EDGE_SOURCES)}")
        if edge_source != "none" and not self.sigmas:
            raise ValueError(f"edges.sigma is empty: edges.source = {edge_source} needs one at least")
        for sigma in self.sigmas if edge_source == "full" else ():
            if sigma not in (edges or {}):
                raise ValueError(f"edges.sigma: no edge maps of sigma {sigma:g} were given; make them first")
            self.edge_maps[sigma] = Tars(*_edge_entries((edges or {})[sigma], entries, manifest), cache)
        self._fetched: dict[int, list[int]] = {}

    def batch(self, step: int) -> Batch:
        """This rank's part of global batch `step` (0, 1, ...).

        {"image": uint8 [b,S,S,3], "mask": uint8 [b,S,S] with 1 = hole, "edge": bool [b,S,S] or None,
        "keys": [(epoch, key)], "part": the global batch's samples that these are, "whole": how many it has}: a quarter
        of the bytes of floats, which the learner makes where it computes. Edges are not multiplied by the mask.
        """
        batch = self._begin()
        self._fill(batch, step, range(len(self.part)))
        return batch

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """batch(start) ... batch(stop - 1), made ahead by `threads` threads."""
        with ThreadPoolExecutor(self.threads, thread_name_prefix="stream") as pool:
            waiting: deque[tuple[Batch, list[Future[None]]]] = deque()
            step = start
            try:
                while waiting or step < stop:
                    while step < stop and len(waiting) <= AHEAD:
                        batch = self._begin()
                        shares = [range(n, len(self.part), self.threads) for n in range(self.threads)]
                        waiting.append((batch, [pool.submit(self._fill, batch, step, n) for n in shares]))
                        step += 1
                    batch, work = waiting.popleft()
                    for future in work:
                        future.result()
                    yield batch
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
                if self.photos.cache:
                    self.photos.cache.close()

    def _begin(self) -> Batch:
        """An empty batch."""
        plane = len(self.part), self.size, self.size
        return {
            "image": np.empty((*plane, 3), np.uint8),
            "mask": np.empty(plane, np.uint8),
            "edge": None if self.edge_source == "none" else np.empty(plane, bool),
            "keys": [(0, "")] * len(self.part),
            "part": self.part,
            "whole": self.whole,
        }

    def _fill(self, batch: Batch, step: int, numbers: range) -> None:
        """Make these samples of this rank's part of global batch `step`."""
        if self.photos.cache:
            self._fetch_ahead(step)
        points = [(self.part[number], number) for number in numbers]
        places = [self.order.at(n // self.each, step * self.each + n % self.each) for n, _ in points]
        for (_, number), place, drawn in zip(points, places, _draws(self.seed, places), strict=True):
            while not self._make(batch, number, place, drawn):
                place = self.order.following(place)
                (drawn,) = _draws(self.seed, [place])

    def _fetch_ahead(self, step: int) -> None:
        """The tars of the windows that these lines come to next."""
        for line in sorted({number // self.each for number in self.part}):
            position = step * self.each
            coming = self.order.shards_near(line, position) + self.order.shards_near(
                line, position + self.order.window
            )
            if coming != self._fetched.get(line):
                self._fetched[line] = coming
                for tars in (self.photos, *self.edge_maps.values()):
                    tars.prefetch(coming)

    def _make(self, batch: Batch, number: int, place: Place, drawn: list[int]) -> bool:
        """Make one sample in its place of the batch; False when it cannot be read."""
        try:
            key, photo = self._photo(place)
            sigma = self.sigmas[drawn[3] % len(self.sigmas)] if self.sigmas else 0.0
            edges = self._edges(sigma, place, key, photo)
        except BadSample as error:
            self._note(error)
            return False
        size, (height, width) = self.size, photo.shape[:2]
        top, left = drawn[0] % (height - size + 1), drawn[1] % (width - size + 1)
        mirrored = self.flip and drawn[2] % 2 == 1

        def cut(source: np.ndarray, target: np.ndarray) -> None:
            crop = source[top : top + size, left : left + size]
            if mirrored:
                cv2.flip(crop, 1, dst=target)  # NumPy would copy it pixel by pixel
            else:
                np.copyto(target, crop)

        image, mask = batch["image"][number], self.mask
        cut(photo, image)
        if mask is None:
            rng = np.random.default_rng((self.seed, place.epoch, place.number))
            mask = self.masks.draw(size, size, rng)
        batch["mask"][number] = mask
        if edges is not None:
            cut(edges.view(np.uint8), batch["edge"][number].view(np.uint8))
        elif self.edge_source == "masked":
            batch["edge"][number] = canny_edges(image, sigma, mask)
        batch["keys"][number] = place.epoch, key
        return True

    def _photo(self, place: Place) -> tuple[str, np.ndarray]:
        key, data = self.photos.read(place.shard, place.row)
        try:
            return key, self.decode(data)
        except ValueError as error:
            raise BadSample(f"{self.photos.entries[place.shard]['name']} {key}", str(error)) from error

    def _edges(self, sigma: float, place: Place, key: str, photo: np.ndarray) -> np.ndarray | None:
        """The whole photograph's edges as 0 and 1, where the source is of whole photographs."""
        if self.edge_source == "live":
            return canny_edges(photo, sigma)
        if self.edge_source != "full":
            return None
        tars = self.edge_maps[sigma]
        same, data = tars.read(place.shard, place.row)
        if same != key:
            raise ValueError(
                f"the edge maps of sigma {sigma:g} are not in the photographs' order: make them again"
            )
        try:
            edges = decode_edges(data)
        except ValueError as error:
            name = f"{tars.entries[place.shard]['name']} {key} of sigma {sigma:g}"
            raise BadSample(name, str(error)) from error
        if edges.shape != photo.shape[:2]:
            raise ValueError(f"the edge maps of sigma {sigma:g} are of other photographs: make them again")
        return edges

    def _note(self, error: BadSample) -> None:
        """Count it once, and say so; TooManyBad when there are too many."""
        with self._lock:
            if error.name not in self.bad:
                print(f"left out: {error}", file=sys.stderr, flush=True)
            self.bad[error.name] = str(error)
            if len(self.bad) > self.max_bad:
                listed = "; ".join(list(self.bad.values())[:5])
                more = f" and {len(self.bad) - 5} more" if len(self.bad) > 5 else ""
                raise TooManyBad(
                    f"{len(self.bad)} samples cannot be read, more than data.max_bad allows: {listed}{more}; "
                    "`inpaint data check` lists all, and makes them again with --repair"
                )


def _draws(seed: int, places: Sequence[Place]) -> list[list[int]]:
    """Four numbers of 64 bits a sample, for its top, left, flip and sigma: SplitMix64 of (seed, epoch, number), all at
    once, as making a generator for each costs more than all else but decoding."""
    state: np.ndarray = np.full(len(places), seed, np.uint64)
    for part in ([place.epoch for place in places], [place.number for place in places]):
        state = _mix(state + _STEP) ^ np.array(part, np.int64).view(np.uint64)
    return _mix(state[:, None] + _STEP * np.arange(1, 5, dtype=np.uint64)).tolist()


_STEP = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


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


def read_split(shards: Storage, split: str, size: int) -> Iterator[tuple[str, np.ndarray]]:
    """(key, centre crop uint8 [size,size,3]) of every photograph of a split, in the manifest's order."""
    manifest = load_manifest(shards)
    entries = _entries(manifest, split, shards.uri)
    _check_size(manifest, size, shards.uri)
    tars, decode = Tars(shards, entries), sample_decoder(manifest)
    for shard, entry in enumerate(entries):
        for row in range(entry["count"]):
            key, data = tars.read(shard, row)
            photo = decode(data)
            top, left = ((length - size) // 2 for length in photo.shape[:2])
            yield key, photo[top : top + size, left : left + size]
