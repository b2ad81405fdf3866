"""Samples of a split's tars by (shard, row): one positioned read each, checked against the index's CRC-32."""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from threading import Lock
from typing import Any, NamedTuple

from data_prep.cache import ShardCache, local_path
from data_prep.storage import MissingKey, Storage, StorageError
from data_prep.tars import read_index

OPEN = 64  # shards whose index stays in memory and whose file stays open
PAUSES = (0.2, 1.0)  # seconds before another try
AGAIN = 60.0  # seconds after which a shard that was lost is looked for again
Read = Callable[[int, int], bytes]  # (offset, size)


class BadSample(ValueError):
    """A sample that cannot be read, in one line that names its shard and key. `name` is what it is counted by."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name = name


class _Shard(NamedTuple):
    keys: list[str]
    offsets: list[int]
    sizes: list[int]
    sums: list[int]
    read: Read

    def sample(self, row: int) -> tuple[str, bytes]:
        """(key, stored bytes); _Damaged when they are not those that were written."""
        data = self.read(self.offsets[row], self.sizes[row])
        if zlib.crc32(data) != self.sums[row]:
            raise _Damaged("its bytes are not those that were written (CRC-32)")
        return self.keys[row], data


class _Damaged(StorageError):
    pass


class Tars:
    """The tars that `entries` of a manifest name in a storage. Safe to use from several threads.

    Those of a bucket are read from `cache`, or where there is none, with a request a sample.
    """

    def __init__(
        self, storage: Storage, entries: Sequence[Mapping[str, Any]], cache: ShardCache | None = None
    ) -> None:
        self.storage, self.entries = storage, entries
        self.cache = cache if storage.path() is None else None
        self._shards: dict[int, _Shard] = {}
        self._lock = Lock()
        self._lost: dict[int, tuple[float, str]] = {}

    def read(self, shard: int, row: int) -> tuple[str, bytes]:
        """(key, stored bytes). What fails is tried again; BadSample when it stays so."""
        found = self._shards.get(shard)
        if found is not None:
            with suppress(StorageError, IndexError):  # tried again below
                return found.sample(row)
        return self._read_patiently(shard, row)

    def _read_patiently(self, shard: int, row: int) -> tuple[str, bytes]:
        name, place = self.entries[shard]["name"], f"row {row}"
        if shard in self._lost:  # the whole shard: its other samples need not wait as long
            since, reason = self._lost[shard]
            if time.monotonic() - since < AGAIN:
                raise BadSample(f"{name} {place}", reason)
        for pause in (*PAUSES, None):
            whole = True
            try:
                found = self._shard(shard)
                whole, place = False, str(found.keys[row])
                return found.sample(row)
            except (StorageError, ValueError, IndexError) as error:
                reason = str(error)
                if self.cache and isinstance(error, _Damaged):
                    self.cache.drop(self.entries[shard])
            with self._lock:
                self._shards.pop(shard, None)  # it may have been made again: look anew
            if pause is not None:
                time.sleep(pause)
        if whole:
            self._lost[shard] = time.monotonic(), reason
        raise BadSample(f"{name} {place}", reason)

    def _shard(self, shard: int) -> _Shard:
        """Opened once; the one that was opened first is forgotten beyond OPEN."""
        with self._lock:
            found = self._shards.get(shard)
            if found is None:
                entry = self.entries[shard]
                index = read_index(self.storage, entry["name"])
                keys, offsets, sizes, sums = (index[c] for c in ("keys", "offsets", "sizes", "crc32"))
                found = self._shards[shard] = _Shard(keys, offsets, sizes, sums, self._open(entry))
                if len(self._shards) > OPEN:
                    self._shards.pop(next(iter(self._shards)))
            return found

    def prefetch(self, shards: Iterable[int]) -> None:
        """Have these tars in the cache soon."""
        if self.cache:
            self.cache.prefetch(self.storage, [self.entries[shard] for shard in shards])

    def _open(self, entry: Mapping[str, Any]) -> Read:
        path = self.storage.path(entry["name"])
        if self.cache:
            path = local_path(self.cache, self.storage, entry)
        if path is not None:
            try:
                return _LocalFile(str(path)).read
            except FileNotFoundError:
                raise MissingKey(f"{entry['name']} is not in {self.storage.uri}") from None
            except OSError as error:
                raise StorageError(f"cannot read {path}: {error.strerror}") from error
        return lambda offset, size: self.storage.read_range(entry["name"], offset, size)


class _LocalFile:
    """An open file, closed when nobody reads it any more."""

    def __init__(self, path: str) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115

    def read(self, offset: int, size: int) -> bytes:
        try:
            return os.pread(self._file.fileno(), size, offset)
        except OSError as error:
            raise StorageError(f"cannot read {self._file.name}: {error.strerror}") from error
