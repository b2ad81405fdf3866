"""Which photographs are sharded together: the listing, held compactly, dealt into slices.

A slice is one task's work and becomes one tar of each split. New photographs are dealt like cards, so that a slice shows
all of the listing (whose order is by class, place or day more often than not), and the slices made before stay as they
are: photographs that come later make new tars only.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_prep.sources import Source
from data_prep.storage import MissingKey, Storage

READERS = 16  # small objects that are fetched at once


@dataclass(frozen=True)
class Slice:
    """Photographs by name, with the marks that tell a changed one."""

    number: int
    names: tuple[str, ...]
    marks: tuple[str, ...]

    @property
    def record(self) -> str:
        """The key under which it is told what became of them."""
        return f"slices/{self.number:05d}.json"

    @property
    def hashes(self) -> list[int]:
        return [photo_hash(name, mark) for name, mark in zip(self.names, self.marks, strict=True)]


class Listing:
    """A source's names and marks: about 60 bytes a photograph beside the names themselves' bytes."""

    def __init__(self, source: Source) -> None:
        self._text, self._ends, digest = bytearray(), array("Q"), hashlib.sha256()
        hashes = array("Q")
        for name, mark in source.listing():
            line = _line(name, mark)
            digest.update(line + b"\n")
            hashes.append(photo_hash(name, mark))
            self._text += line
            self._ends.append(len(self._text))
        self.hashes = np.frombuffer(hashes, np.uint64)
        self.digest = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._ends)

    def slice(self, number: int, rows: Iterable[int]) -> Slice:
        """Those rows of the listing."""
        pairs = [self._pair(row) for row in rows]
        return Slice(number, tuple(name for name, _ in pairs), tuple(mark for _, mark in pairs))

    def _pair(self, row: int) -> tuple[str, str]:
        start = self._ends[row - 1] if row else 0
        name, _, mark = bytes(self._text[start : self._ends[row]]).partition(b"\0")
        return name.decode("utf-8", "surrogateescape"), mark.decode()


def _line(name: str, mark: str) -> bytes:
    return name.encode("utf-8", "surrogateescape") + b"\0" + mark.encode()


def photo_hash(name: str, mark: str) -> int:
    """64 bits: in ten million photographs, two that differ are taken for one with a chance of 3 in a million."""
    return int.from_bytes(hashlib.blake2b(_line(name, mark), digest_size=8).digest(), "big")


def deal(listing: Listing, before: Sequence[Slice], length: int) -> list[Slice]:
    """The slices of before, without what has left the listing, and then new ones of `length` photographs at most."""
    present = np.sort(listing.hashes)
    known, slices = [np.empty(0, np.uint64)], []
    for piece in before:
        hashes = np.array(piece.hashes, np.uint64)
        kept = np.flatnonzero(_among(hashes, present))
        known.append(hashes)
        names, marks = (tuple(column[row] for row in kept) for column in (piece.names, piece.marks))
        slices.append(piece if len(kept) == len(hashes) else Slice(piece.number, names, marks))
    fresh = np.flatnonzero(~_among(listing.hashes, np.sort(np.concatenate(known))))
    count = -(-len(fresh) // length)
    return slices + [listing.slice(len(before) + n, fresh[n::count].tolist()) for n in range(count)]


def _among(hashes: np.ndarray, ordered: np.ndarray) -> np.ndarray:
    """bool: which of them are in a sorted array."""
    if not len(ordered):
        return np.zeros(len(hashes), bool)
    return ordered[np.minimum(np.searchsorted(ordered, hashes), len(ordered) - 1)] == hashes


def read_slices(out: Storage, stop: int, start: int = 0) -> list[tuple[Slice, dict[str, Any]] | None]:
    """Slices `start`... `stop` - 1 with what became of them, as their records tell; None where there is no record."""

    def read(number: int) -> tuple[Slice, dict[str, Any]] | None:
        try:
            found = json.loads(out.read(Slice(number, (), ()).record))
            return Slice(number, tuple(found["names"]), tuple(found["marks"])), found["part"]
        except (MissingKey, ValueError, KeyError, TypeError):  # damaged is as good as none: it is made again
            return None

    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(read, range(start, stop)))


def write_record(out: Storage, piece: Slice, part: dict[str, Any]) -> None:
    told = {"names": piece.names, "marks": piece.marks, "part": part}
    out.write(piece.record, json.dumps(told).encode())
