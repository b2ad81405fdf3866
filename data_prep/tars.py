"""Webdataset tars with an index each: written in one pass, read by position.

Times and owners are fixed, so that the same samples give the same bytes. The index (the same name with .json) holds the
offset, size and CRC-32 of each member: one positioned read fetches a sample and detects a flipped byte.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from threading import Lock
from typing import IO, Any, NamedTuple

from data_prep.cache import ShardCache, cached_path
from data_prep.manifest import TarEntry
from data_prep.os_errors import explain_os_error
from data_prep.storage import MissingKey, Storage, StorageError

_BLOCK, _RECORD = tarfile.BLOCKSIZE, tarfile.RECORDSIZE
MAX_OPEN_SHARDS = 64  # with their index in memory and their file open
RETRY_DELAYS = (0.2, 1.0)  # seconds
RETRY_LOST_SECONDS = 60.0  # until a shard that could not be opened is tried again
ReadRange = Callable[[int, int], bytes]  # (offset, size)


@dataclass
class TarWriter:
    """Streams members to `file`; only the index stays in memory."""

    file: IO[bytes]
    keys: list[str] = field(default_factory=list)
    suffixes: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    crc32: list[int] = field(default_factory=list)
    size: int = 0
    _finished: bool = False
    _hash: Any = field(default_factory=hashlib.sha256)

    def add(self, member: str, data: bytes) -> None:
        """`member` is key.suffix."""
        info = tarfile.TarInfo(member)
        info.size, info.mode = len(data), 0o444
        self._write(info.tobuf(tarfile.USTAR_FORMAT))
        key, _, suffix = member.partition(".")
        self.keys.append(key)
        self.suffixes.append(suffix)
        self.offsets.append(self.size)
        self.sizes.append(len(data))
        self.crc32.append(zlib.crc32(data))
        self._write(data)
        self._write(bytes(-len(data) % _BLOCK))

    def size_with(self, size: int) -> int:
        """Bytes of the finished tar if one more member of `size` bytes were added."""
        content = self.size + _BLOCK + size + -size % _BLOCK + 2 * _BLOCK
        return content + -content % _RECORD

    def finish(self) -> None:
        """Write the end of the tar: two empty blocks, padded to a whole record. Further calls do nothing."""
        if not self._finished:
            self._finished = True
            self._write(bytes(2 * _BLOCK + -(self.size + 2 * _BLOCK) % _RECORD))

    def _write(self, data: bytes) -> None:
        self.file.write(data)
        self._hash.update(data)
        self.size += len(data)

    @property
    def index(self) -> dict[str, list]:
        return {
            "keys": self.keys,
            "suffixes": self.suffixes,
            "offsets": self.offsets,
            "sizes": self.sizes,
            "crc32": self.crc32,
        }

    def entry(self, name: str) -> TarEntry:
        """The manifest entry of the tar under this name."""
        return TarEntry(name, len(self.keys), self.size, self._hash.hexdigest())


@contextmanager
def open_tar_for_write(out: Storage, name: str, extra_fields: dict[str, Any]) -> Iterator[TarWriter]:
    """A tar that is published, just after its index, when the block ends without an error.

    `extra_fields` are added to the index at the end.
    """
    with out.open_for_write(name) as file:
        tar = TarWriter(file)
        yield tar
        tar.finish()
        out.write(index_name(name), json.dumps({**tar.index, **extra_fields}).encode())


def write_tar(
    out: Storage, name: str, members: Iterable[tuple[str, bytes]], extra_fields: dict[str, Any] | None = None
) -> TarEntry:
    """Publish a tar of (file name, bytes). Returns its manifest entry."""
    with open_tar_for_write(out, name, extra_fields or {}) as tar:
        for member, data in members:
            tar.add(member, data)
    return tar.entry(name)


def index_name(shard: str) -> str:
    return shard.removesuffix(".tar") + ".json"


def read_index(shards: Storage, shard: str) -> dict[str, list]:
    """The index of a tar: keys, suffixes, offsets, sizes, crc32; for photograph tars also shapes ([height, width]) and
    names.

    Raises MissingKey, or ValueError if the index is damaged.
    """
    try:
        index = json.loads(shards.read(index_name(shard)))
        lengths = {len(index[column]) for column in ("keys", "suffixes", "offsets", "sizes", "crc32")}
    except (ValueError, KeyError, TypeError):
        lengths = set()
    if len(lengths) != 1:
        raise ValueError(f"{index_name(shard)} in {shards.uri} is damaged: rebuild {shard}")
    return index


class UnreadableSample(ValueError):
    """A sample that cannot be read; the message begins with its shard and key, which `name` holds."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name = name


class _OpenShard(NamedTuple):
    keys: list[str]
    offsets: list[int]
    sizes: list[int]
    crc32: list[int]
    read: ReadRange

    def sample(self, row: int) -> tuple[str, bytes]:
        """(key, stored bytes). Raises _CrcMismatch if the bytes have changed."""
        data = self.read(self.offsets[row], self.sizes[row])
        if zlib.crc32(data) != self.crc32[row]:
            raise _CrcMismatch("its bytes are not those that were written (CRC-32)")
        return self.keys[row], data


class _CrcMismatch(StorageError):
    pass


class TarReader:
    """Reads samples of the tars in `entries`, a manifest's list. Thread-safe.

    Tars in a bucket are read through `cache`, or without a cache with one request per sample.
    """

    def __init__(
        self, storage: Storage, entries: Sequence[TarEntry], cache: ShardCache | None = None
    ) -> None:
        self.storage, self.entries = storage, entries
        self.cache = cache if storage.local_path() is None else None
        self._open_shards: dict[int, _OpenShard] = {}
        self._lock = Lock()
        self._lost_shards: dict[int, tuple[float, str]] = {}

    def read(self, shard: int, row: int) -> tuple[str, bytes]:
        """(key, stored bytes) of row `row` of shard `shard`. Raises UnreadableSample after several tries."""
        open_shard = self._open_shards.get(shard)
        if open_shard is not None:
            with suppress(StorageError, IndexError):  # retried below
                return open_shard.sample(row)
        return self._read_with_retries(shard, row)

    def _read_with_retries(self, shard: int, row: int) -> tuple[str, bytes]:
        name, sample = self.entries[shard].name, f"row {row}"
        if shard in self._lost_shards:  # do not retry for every sample of a lost shard
            since, reason = self._lost_shards[shard]
            if time.monotonic() - since < RETRY_LOST_SECONDS:
                raise UnreadableSample(f"{name} {sample}", reason)
        for delay in (*RETRY_DELAYS, None):
            opened = False
            try:
                open_shard = self._open_shard(shard)
                opened, sample = True, str(open_shard.keys[row])
                return open_shard.sample(row)
            except (StorageError, ValueError, IndexError) as error:
                reason = str(error)
                if self.cache and isinstance(error, _CrcMismatch):
                    self.cache.discard(self.entries[shard])
            with self._lock:
                self._open_shards.pop(shard, None)  # it may have been rebuilt: open it again
            if delay is not None:
                time.sleep(delay)
        if not opened:
            self._lost_shards[shard] = time.monotonic(), reason
        raise UnreadableSample(f"{name} {sample}", reason)

    def _open_shard(self, shard: int) -> _OpenShard:
        """Opens the shard on first use. Closes the oldest if more than MAX_OPEN_SHARDS are open."""
        with self._lock:
            open_shard = self._open_shards.get(shard)
            if open_shard is None:
                entry = self.entries[shard]
                index = read_index(self.storage, entry.name)
                keys, offsets, sizes, crc32 = (index[c] for c in ("keys", "offsets", "sizes", "crc32"))
                open_shard = _OpenShard(keys, offsets, sizes, crc32, self._open_tar(entry))
                self._open_shards[shard] = open_shard
                if len(self._open_shards) > MAX_OPEN_SHARDS:
                    self._open_shards.pop(next(iter(self._open_shards)))
            return open_shard

    def prefetch(self, shards: Iterable[int]) -> None:
        """Download these tars to the cache in the background."""
        if self.cache:
            self.cache.prefetch(self.storage, [self.entries[shard] for shard in shards])

    def _open_tar(self, entry: TarEntry) -> ReadRange:
        path = self.storage.local_path(entry.name)
        if self.cache:
            path = cached_path(self.cache, self.storage, entry)
        if path is not None:
            try:
                return _LocalFile(str(path)).read
            except FileNotFoundError:
                raise MissingKey(f"{entry.name} is not in {self.storage.uri}") from None
            except OSError as error:
                raise StorageError(f"cannot read {path}: {explain_os_error(error)}") from error
        return lambda offset, size: self.storage.read_range(entry.name, offset, size)


class _LocalFile:
    """An open file, closed by garbage collection."""

    def __init__(self, path: str) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115

    def read(self, offset: int, size: int) -> bytes:
        try:
            return os.pread(self._file.fileno(), size, offset)
        except OSError as error:
            raise StorageError(f"cannot read {self._file.name}: {explain_os_error(error)}") from error
