"""Tars of a bucket on this machine's disk: downloaded once for all processes and runs, verified, bounded in bytes.

Files are named by their sha256, so whatever recipe asks for the same tar finds it. What is read least recently goes
first; a reader that has it open keeps it. Everything is guarded by file locks, which die with their holders: a killed
download is taken up by the next who wants it, and its leftovers are removed by the next who needs room.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock
from typing import Any

from data_prep.storage import TEMPORARY, Storage, StorageError

DOWNLOADS = 2  # tars that are fetched ahead side by side
PAUSES = (0.5, 2.0)  # seconds before what came damaged is downloaded again
BUSY = 60.0, 0.1  # seconds for which others' downloads may take all the room, and between two looks


class CacheFull(StorageError):
    """The tar cannot be kept here: it is larger than the cache, or the disk is full or fails."""


class ShardCache:
    """A folder of this machine that holds `limit` bytes of tars at most. Safe to share among threads and processes."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if folder.stat().st_uid != os.getuid():
            raise StorageError(f"data.cache_dir {folder} belongs to somebody else: choose another folder")
        self._pool: ThreadPoolExecutor | None = None
        self._asked: set[str] = set()
        self._lock = Lock()

    def path(self, storage: Storage, entry: Mapping[str, Any]) -> Path:
        """The local file of a manifest's entry, downloaded and verified where it is not there yet.

        Raises StorageError when it cannot be had, or is not what the manifest says; CacheFull when there is no room.
        """
        path = self._file(entry)
        try:
            while True:
                if not _is_there(path, entry):
                    with self._locked(f"{entry['sha256']}.lock"):
                        if not _is_there(path, entry):
                            self._download(storage, entry, path)
                with suppress(FileNotFoundError):  # another process made room of it in this moment
                    os.utime(path)  # read now: it goes last
                    return path
        except StorageError:
            raise
        except OSError as error:
            raise CacheFull(f"data.cache_dir {self.folder} cannot be used: {error.strerror}") from error

    def drop(self, entry: Mapping[str, Any]) -> None:
        """Forget a file whose bytes turned out damaged."""
        self._file(entry).unlink(missing_ok=True)

    def _file(self, entry: Mapping[str, Any]) -> Path:
        """Its place, which no manifest leads out of the folder."""
        if not re.fullmatch("[0-9a-f]{64}", str(entry["sha256"])):
            raise StorageError(f"{entry['name']!r} has no sha256 in its manifest, but {entry['sha256']!r}")
        return self.folder / f"{entry['sha256']}.tar"

    def prefetch(self, storage: Storage, entries: Iterable[Mapping[str, Any]]) -> None:
        """Download these soon, in the background; what fails is left for who needs it. Not more than half of the cache
        is fetched ahead."""
        room = self.limit // 2
        for entry in entries:
            room -= entry["bytes"]
            with self._lock:
                if room < 0 or entry["sha256"] in self._asked:
                    continue
                self._asked.add(entry["sha256"])
                self._pool = self._pool or ThreadPoolExecutor(DOWNLOADS, thread_name_prefix="prefetch")
                self._pool.submit(self._fetch, storage, dict(entry))

    def close(self) -> None:
        """Stop fetching ahead, until somebody asks again."""
        with self._lock:
            pool, self._pool = self._pool, None
            self._asked.clear()
        if pool:
            pool.shutdown(wait=False, cancel_futures=True)

    def _fetch(self, storage: Storage, entry: dict[str, Any]) -> None:
        try:
            with suppress(StorageError, OSError):
                self.path(storage, entry)
        finally:
            with self._lock:
                self._asked.discard(entry["sha256"])

    def _download(self, storage: Storage, entry: Mapping[str, Any], path: Path) -> None:
        name, expected = entry["name"], entry["sha256"]
        part = self.folder / f"{TEMPORARY}{expected}"
        try:
            for pause in (*PAUSES, None):
                try:
                    found = self._fetch_into(part, storage, entry)
                except (StorageError, OSError) as error:
                    if not _disk_is_full(error):
                        raise
                    found = self._fetch_into(part, storage, entry, freed=entry["bytes"])
                if found == expected:
                    os.replace(part / "tar", path)
                    return
                if pause is not None:
                    time.sleep(pause)
            raise StorageError(
                f"{name} in {storage.uri} is not what the manifest says (sha256 {found[:12]} instead of "
                f"{expected[:12]}): `inpaint data check` finds what is damaged"
            )
        except (StorageError, OSError) as error:
            if _disk_is_full(error):
                raise CacheFull(f"the disk of data.cache_dir {self.folder} is full") from error
            raise
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def _fetch_into(self, part: Path, storage: Storage, entry: Mapping[str, Any], freed: int = 0) -> str:
        """Download to `part`/tar, after `freed` bytes more than the limit asks for were removed; its sha256."""
        shutil.rmtree(part, ignore_errors=True)
        self._hold_room(entry["bytes"], part, entry["name"], freed)
        storage.download(entry["name"], part / "tar")
        with open(part / "tar", "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def _hold_room(self, size: int, part: Path, name: str, freed: int) -> None:
        """Hold `size` bytes by a file in `part` that seems so long; others' downloads that hold the room are awaited."""
        if size > self.limit:
            raise CacheFull(f"{name} has {size} bytes, more than data.cache_gb holds ({self.limit} bytes)")
        deadline = time.monotonic() + BUSY[0]
        while True:
            with self._locked("room.lock"):
                if self._make_room(size, freed):
                    part.mkdir()
                    with open(part / "room", "wb") as file:
                        file.truncate(size)
                    return
            if time.monotonic() > deadline:
                raise CacheFull(
                    f"no room for {name}: other downloads hold data.cache_gb ({self.limit} bytes)"
                )
            time.sleep(BUSY[1])

    def _make_room(self, size: int, freed: int) -> bool:
        """Remove what was read least recently until `size` bytes fit and `freed` are free; whether they fit."""
        held, tars = 0, []
        for path in self.folder.iterdir():
            with suppress(FileNotFoundError):
                if path.suffix == ".tar":
                    status = path.stat()
                    tars.append((status.st_mtime, status.st_size, path))
                elif path.name.startswith(TEMPORARY) and not self._left_by_the_dead(path):
                    held += (path / "room").stat().st_size
        if held + size > self.limit:
            return False  # whatever is removed
        held += sum(length for _, length, _ in tars)
        for _, length, path in sorted(tars):
            if held + size <= self.limit and freed <= 0:
                break
            path.unlink(missing_ok=True)
            held, freed = held - length, freed - length
        return True

    def _left_by_the_dead(self, part: Path) -> bool:
        """Whether nobody downloads to `part`; then it is removed."""
        with suppress(BlockingIOError), self._locked(f"{part.name[len(TEMPORARY) :]}.lock", wait=False):
            shutil.rmtree(part, ignore_errors=True)
            return True
        return False

    @contextmanager
    def _locked(self, name: str, wait: bool = True) -> Iterator[None]:
        """One thread of one process at a time; BlockingIOError when there is another and `wait` is not."""
        with open(self.folder / name, "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield


def local_path(cache: ShardCache, storage: Storage, entry: Mapping[str, Any]) -> Path | None:
    """`cache.path`, or None, with a warning, where the cache cannot hold it: then it is read from the bucket."""
    try:
        return cache.path(storage, entry)
    except CacheFull as error:
        warnings.warn(f"{error}; its samples are read from {storage.uri} one by one", stacklevel=2)
        return None


def _is_there(path: Path, entry: Mapping[str, Any]) -> bool:
    """By its size: its bytes were verified when it came, and every sample's are as it is read."""
    try:
        return path.stat().st_size == entry["bytes"]
    except FileNotFoundError:
        return False


def _disk_is_full(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    return False
