"""Tars of a bucket on this machine's disk: downloaded once for all processes and runs, verified, bounded in bytes.

Files are named by their sha256, so whatever recipe asks for the same tar finds it. What is read least recently goes
first; a reader that has it open keeps it. Everything is guarded by file locks, which die with their holders: a killed
download is taken up by the next who wants it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock
from typing import Any

from data_prep.storage import TEMPORARY, Storage, StorageError

STALE = 3600.0  # seconds after which what a killed download left is removed
DOWNLOADS = 2  # tars that are fetched ahead side by side
TRIES = 3


class CacheFull(StorageError):
    """The tar cannot be kept here: it is larger than the cache, or the disk is full."""


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
        path = self.folder / f"{entry['sha256']}.tar"
        if not _is_there(path, entry):
            with self._locked(f"{entry['sha256']}.lock"):
                if not _is_there(path, entry):
                    self._download(storage, entry, path)
        os.utime(path)  # read now: it goes last
        return path

    def drop(self, entry: Mapping[str, Any]) -> None:
        """Forget a file whose bytes turned out damaged."""
        (self.folder / f"{entry['sha256']}.tar").unlink(missing_ok=True)

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
        """Stop fetching ahead."""
        if self._pool:
            self._pool.shutdown(wait=False, cancel_futures=True)

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
            for _ in range(TRIES):
                self._make_room(entry["bytes"], part, name)
                storage.download(name, part)
                found = _sha256(part)
                if found == expected:
                    os.replace(part, path)
                    return
            raise StorageError(
                f"{name} in {storage.uri} is not what the manifest says (sha256 {found[:12]} instead of "
                f"{expected[:12]}): `inpaint data check` finds what is damaged"
            )
        except (StorageError, OSError) as error:
            if _disk_is_full(error):
                raise CacheFull(f"the disk of data.cache_dir {self.folder} is full") from error
            raise
        finally:
            part.unlink(missing_ok=True)

    def _make_room(self, size: int, part: Path, name: str) -> None:
        """Remove what was read least recently until `size` more bytes fit; hold them by a file that seems so long."""
        if size > self.limit:
            raise CacheFull(f"{name} has {size} bytes, more than data.cache_gb holds ({self.limit} bytes)")
        with self._locked("room.lock"):
            files = sorted(self._files(), key=lambda found: found[1].st_mtime)
            total = sum(status.st_size for _, status in files)
            for path, _ in [found for found in files if found[0].suffix == ".tar"]:
                if total + size <= self.limit:
                    break
                total -= path.stat().st_size if path.exists() else 0
                path.unlink(missing_ok=True)
            with open(part, "wb") as file:
                file.truncate(size)

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        """Tars, and the room that is held for downloads; what a killed one left is removed."""
        for path in self.folder.iterdir():
            with suppress(FileNotFoundError):
                status, unpublished = path.stat(), path.name.startswith(TEMPORARY)
                if unpublished and time.time() - status.st_mtime > STALE:
                    path.unlink()
                elif path.suffix == ".tar" or len(path.name) == len(TEMPORARY) + 64:
                    yield path, status

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        with open(self.folder / name, "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
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


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _disk_is_full(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    return False
