"""Samples of a split's tars by (shard, row): one positioned read each, checked against the index's CRC-32."""

from __future__ import annotations

import os
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from threading import Lock
from typing import Any

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


class Tars:
    """The tars that `entries` of a manifest name in a storage. Safe to use from several threads."""

    def __init__(self, storage: Storage, entries: Sequence[Mapping[str, Any]]) -> None:
        self.storage, self.entries = storage, entries
        self._indexes: OrderedDict[int, dict[str, list]] = OrderedDict()
        self._files: OrderedDict[int, Read] = OrderedDict()
        self._lock = Lock()
        self._lost: dict[int, tuple[float, str]] = {}

    def read(self, shard: int, row: int) -> tuple[str, bytes]:
        """(key, stored bytes). What fails is tried again; BadSample when it stays so."""
        name, place = self.entries[shard]["name"], f"row {row}"
        since, reason = self._lost.get(shard, (-AGAIN, ""))
        if time.monotonic() - since < AGAIN:  # the whole shard: its other samples need not wait as long
            raise BadSample(f"{name} {place}", reason)
        for pause in (*PAUSES, None):
            whole = True
            try:
                index, file = self._index(shard), self._file(shard)
                whole = False
                key, offset, size = index["keys"][row], index["offsets"][row], index["sizes"][row]
                place = str(key)
                data = file(offset, size)
                if zlib.crc32(data) == index["crc32"][row]:
                    return key, data
                reason = "its bytes are not those that were written (CRC-32)"
            except (StorageError, ValueError, IndexError) as error:
                reason = str(error)
            self._forget(shard)
            if pause is not None:
                time.sleep(pause)
        if whole:
            self._lost[shard] = time.monotonic(), reason
        raise BadSample(f"{name} {place}", reason)

    def _index(self, shard: int) -> dict[str, list]:
        return _kept(
            self._indexes, self._lock, shard, lambda: read_index(self.storage, self.entries[shard]["name"])
        )

    def _file(self, shard: int) -> Read:
        return _kept(self._files, self._lock, shard, lambda: self._open(self.entries[shard]))

    def _open(self, entry: Mapping[str, Any]) -> Read:
        path = self.storage.path(entry["name"])
        if path is not None:
            try:
                return _LocalFile(str(path)).read
            except FileNotFoundError:
                raise MissingKey(f"{entry['name']} is not in {self.storage.uri}") from None
            except OSError as error:
                raise StorageError(f"cannot read {path}: {error.strerror}") from error
        return lambda offset, size: self.storage.read_range(entry["name"], offset, size)

    def _forget(self, shard: int) -> None:
        """Look at the shard anew with the next read: it may have been made again."""
        with self._lock:
            self._indexes.pop(shard, None)
            self._files.pop(shard, None)


class _LocalFile:
    """An open file, closed when nobody reads it any more."""

    def __init__(self, path: str) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115

    def read(self, offset: int, size: int) -> bytes:
        try:
            return os.pread(self._file.fileno(), size, offset)
        except OSError as error:
            raise StorageError(f"cannot read {self._file.name}: {error.strerror}") from error


def _kept(known: OrderedDict[int, Any], lock: Lock, shard: int, make: Callable[[], Any]) -> Any:
    """What is known of a shard, made once where it is not; the oldest is forgotten beyond OPEN."""
    found = known.get(shard)
    if found is None:
        with lock:
            found = known.get(shard)
            if found is None:
                found = known[shard] = make()
                if len(known) > OPEN:
                    known.popitem(last=False)
    return found
