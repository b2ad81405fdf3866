"""Assigns the photographs of a source to partitions: one sharding task per partition, which writes its own tars.

New photographs are assigned round-robin, so that each partition is a sample of the whole listing, which is often sorted
by class, place or date. Existing partitions do not change, so later photographs only add new tars.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from data_prep.left_out import LeftOut
from data_prep.manifest import PartitionResult, rename_version_2_entries
from data_prep.records import RecordError, decode, to_json
from data_prep.sources import PhotoSource
from data_prep.storage import MissingKey, Storage

IO_THREADS = 16  # for reading small objects


@dataclass(frozen=True)
class Partition:
    """Names of photographs, and fingerprints that show whether a photograph has changed."""

    index: int
    names: tuple[str, ...]
    fingerprints: tuple[str, ...]

    @property
    def record_key(self) -> str:
        """The key of its PartitionRecord."""
        return f"partitions/{self.index:05d}.json"

    @property
    def hashes(self) -> list[int]:
        return [
            photo_hash(name, fingerprint)
            for name, fingerprint in zip(self.names, self.fingerprints, strict=True)
        ]


class SourceListing:
    """A source's names and fingerprints, in about 60 bytes per photograph plus the names.

    `left_out` holds the source's other files; it is not part of the digest.
    """

    def __init__(self, source: PhotoSource, left_out: LeftOut | None = None) -> None:
        self.left_out = LeftOut() if left_out is None else left_out
        self._buffer, self._ends, digest = bytearray(), array("Q"), hashlib.sha256()
        hashes = array("Q")
        for name, fingerprint in source.list_photos(self.left_out):
            entry = _encode_entry(name, fingerprint)
            digest.update(entry + b"\n")
            hashes.append(photo_hash(name, fingerprint))
            self._buffer += entry
            self._ends.append(len(self._buffer))
        self.hashes = np.frombuffer(hashes, np.uint64)
        self.digest = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._ends)

    def partition(self, index: int, rows: Iterable[int]) -> Partition:
        """A partition of these rows of the listing."""
        entries = [self._entry(row) for row in rows]
        return Partition(
            index, tuple(name for name, _ in entries), tuple(fingerprint for _, fingerprint in entries)
        )

    def _entry(self, row: int) -> tuple[str, str]:
        start = self._ends[row - 1] if row else 0
        name, _, fingerprint = bytes(self._buffer[start : self._ends[row]]).partition(b"\0")
        return name.decode("utf-8", "surrogateescape"), fingerprint.decode()


def _encode_entry(name: str, fingerprint: str) -> bytes:
    return name.encode("utf-8", "surrogateescape") + b"\0" + fingerprint.encode()


def photo_hash(name: str, fingerprint: str) -> int:
    """64-bit hash. Among ten million photographs, a collision has a probability of 3 in a million."""
    return int.from_bytes(hashlib.blake2b(_encode_entry(name, fingerprint), digest_size=8).digest(), "big")


def assign_partitions(
    listing: SourceListing, existing: Sequence[Partition], partition_size: int
) -> list[Partition]:
    """The existing partitions, without photographs that left the listing, then new ones of at most `partition_size`
    photographs."""
    listed = np.sort(listing.hashes)
    assigned, partitions = [np.empty(0, np.uint64)], []
    for partition in existing:
        hashes = np.array(partition.hashes, np.uint64)
        rows = np.flatnonzero(_isin_sorted(hashes, listed))
        assigned.append(hashes)
        names, fingerprints = (
            tuple(column[row] for row in rows) for column in (partition.names, partition.fingerprints)
        )
        unchanged = len(rows) == len(hashes)
        partitions.append(partition if unchanged else Partition(partition.index, names, fingerprints))
    new_rows = np.flatnonzero(~_isin_sorted(listing.hashes, np.sort(np.concatenate(assigned))))
    count = -(-len(new_rows) // partition_size)
    return partitions + [
        listing.partition(len(existing) + n, new_rows[n::count].tolist()) for n in range(count)
    ]


def _isin_sorted(hashes: np.ndarray, sorted_hashes: np.ndarray) -> np.ndarray:
    """np.isin for a sorted second array: bool, of the length of `hashes`."""
    if not len(sorted_hashes):
        return np.zeros(len(hashes), bool)
    rows = np.minimum(np.searchsorted(sorted_hashes, hashes), len(sorted_hashes) - 1)
    return sorted_hashes[rows] == hashes


@dataclass(frozen=True)
class PartitionRecord:
    """The stored record of a finished partition."""

    names: tuple[str, ...]
    fingerprints: tuple[str, ...]
    result: PartitionResult


def read_partition_records(
    out: Storage, stop: int, start: int = 0
) -> list[tuple[Partition, PartitionResult] | None]:
    """Partitions `start`... `stop` - 1 with their results; None where there is no valid record."""

    def read(index: int) -> tuple[Partition, PartitionResult] | None:
        key = Partition(index, (), ()).record_key
        try:
            text = out.read(key)
        except MissingKey:
            text = _read_version_2(out, index)
        try:
            record = decode(PartitionRecord, text, key)
        except RecordError:  # a damaged record counts as missing
            return None
        return Partition(index, record.names, record.fingerprints), record.result

    with ThreadPoolExecutor(IO_THREADS) as pool:
        return list(pool.map(read, range(start, stop)))


def _read_version_2(out: Storage, index: int) -> bytes:
    """The record of a partition of release 0.1.0, with the field names of today; empty if there is none."""
    try:
        record = json.loads(out.read(f"slices/{index:05d}.json"))
        record["fingerprints"], record["result"] = record.pop("marks"), record.pop("part")
        rename_version_2_entries(record["result"])
    except (MissingKey, ValueError, KeyError, TypeError, AttributeError):
        return b""
    return json.dumps(record).encode()


def write_partition_record(out: Storage, partition: Partition, result: PartitionResult) -> None:
    record = PartitionRecord(partition.names, partition.fingerprints, result)
    out.write(partition.record_key, json.dumps(to_json(record)).encode())
