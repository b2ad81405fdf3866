"""Tars of a bucket cached on the local disk: shared by all processes and runs, verified, bounded in bytes.

Files are named by their sha256, so that all recipes share them. Least recently used tars are evicted first; open files
stay readable. File locks guard everything, and the kernel releases a dead process's locks: the next process that needs
the tar restarts a killed download, and the next one that needs space removes its temporary files.
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
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock

from data_prep.manifest import TarEntry
from data_prep.os_errors import explain_os_error
from data_prep.storage import TEMPORARY, Storage, StorageError

PREFETCH_THREADS = 2
RETRY_DELAYS = (0.5, 2.0)  # seconds before a damaged download is repeated
RESERVE_TIMEOUT_SECONDS = 60.0  # waiting for space that other downloads hold
RESERVE_POLL_SECONDS = 0.1


class CacheFull(StorageError):
    """The tar cannot be cached: it is larger than the cache, or the disk is full or fails."""


class ShardCache:
    """A local folder that holds at most `max_bytes` of tars. Safe to share among threads and processes."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise StorageError(
                f"data.cache_dir {folder} cannot be created: {explain_os_error(error)}"
            ) from error
        if folder.stat().st_uid != os.getuid():
            raise StorageError(f"data.cache_dir {folder} belongs to another user: choose another folder")
        self._pool: ThreadPoolExecutor | None = None
        self._queued: set[str] = set()
        self._lock = Lock()

    def fetch(self, storage: Storage, entry: TarEntry) -> Path:
        """The local file of a manifest's entry. Downloads and verifies it if it is not cached.

        Raises StorageError if it is unavailable or is not what the manifest says, CacheFull if there is no space.
        """
        path = self._cached_file(entry)
        try:
            while True:
                if not _is_cached(path, entry):
                    with self._file_lock(f"{entry.sha256}.lock"):
                        if not _is_cached(path, entry):
                            self._download_verified(storage, entry, path)
                with suppress(FileNotFoundError):  # another process has just evicted it
                    os.utime(path)  # most recently used
                    return path
        except StorageError:
            raise
        except OSError as error:
            raise CacheFull(
                f"data.cache_dir {self.folder} cannot be used: {explain_os_error(error)}"
            ) from error

    def discard(self, entry: TarEntry) -> None:
        """Remove a file whose bytes turned out to be damaged."""
        self._cached_file(entry).unlink(missing_ok=True)

    def _cached_file(self, entry: TarEntry) -> Path:
        """Its path; checked, as a hostile manifest could lead out of the folder."""
        if not re.fullmatch("[0-9a-f]{64}", entry.sha256):
            raise StorageError(f"{entry.name!r} has no valid sha256 in its manifest, but {entry.sha256!r}")
        return self.folder / f"{entry.sha256}.tar"

    def prefetch(self, storage: Storage, entries: Iterable[TarEntry]) -> None:
        """Download these tars in the background, up to half of the cache. Errors are left to `fetch`."""
        free_bytes = self.max_bytes // 2
        for entry in entries:
            free_bytes -= entry.bytes
            with self._lock:
                if free_bytes < 0 or entry.sha256 in self._queued:
                    continue
                self._queued.add(entry.sha256)
                self._pool = self._pool or ThreadPoolExecutor(PREFETCH_THREADS, thread_name_prefix="prefetch")
                self._pool.submit(self._prefetch_one, storage, entry)

    def stop_prefetch(self) -> None:
        """Cancel queued downloads; a later `prefetch` starts again."""
        with self._lock:
            pool, self._pool = self._pool, None
            self._queued.clear()
        if pool:
            pool.shutdown(wait=False, cancel_futures=True)

    def _prefetch_one(self, storage: Storage, entry: TarEntry) -> None:
        try:
            with suppress(StorageError, OSError):
                self.fetch(storage, entry)
        finally:
            with self._lock:
                self._queued.discard(entry.sha256)

    def _download_verified(self, storage: Storage, entry: TarEntry, path: Path) -> None:
        name, expected = entry.name, entry.sha256
        temporary = self.folder / f"{TEMPORARY}{expected}"
        try:
            for delay in (*RETRY_DELAYS, None):
                try:
                    sha256 = self._download_into(temporary, storage, entry)
                except (StorageError, OSError) as error:
                    if not _is_disk_full(error):
                        raise
                    sha256 = self._download_into(temporary, storage, entry, extra_free=entry.bytes)
                if sha256 == expected:
                    os.replace(temporary / "tar", path)
                    return
                if delay is not None:
                    time.sleep(delay)
            raise StorageError(
                f"{name} in {storage.uri} is not what the manifest says (sha256 {sha256[:12]} instead of "
                f"{expected[:12]}): `inpaint data check` finds what is damaged"
            )
        except (StorageError, OSError) as error:
            if _is_disk_full(error):
                raise CacheFull(f"the disk of data.cache_dir {self.folder} is full") from error
            raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _download_into(self, temporary: Path, storage: Storage, entry: TarEntry, extra_free: int = 0) -> str:
        """Download to `temporary`/tar and return its sha256. Evicts `extra_free` bytes more than the limit asks for."""
        shutil.rmtree(temporary, ignore_errors=True)
        self._reserve(entry.bytes, temporary, entry.name, extra_free)
        storage.download(entry.name, temporary / "tar")
        with open(temporary / "tar", "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def _reserve(self, size: int, temporary: Path, name: str, extra_free: int) -> None:
        """Reserve `size` bytes by a sparse file of that size in `temporary`. Waits while other downloads hold the
        space."""
        if size > self.max_bytes:
            raise CacheFull(
                f"{name} has {size} bytes, more than data.cache_gb holds ({self.max_bytes} bytes)"
            )
        deadline = time.monotonic() + RESERVE_TIMEOUT_SECONDS
        while True:
            with self._file_lock("room.lock"):
                if self._evict_lru(size, extra_free):
                    temporary.mkdir()
                    with open(temporary / "room", "wb") as file:
                        file.truncate(size)
                    return
            if time.monotonic() > deadline:
                raise CacheFull(
                    f"no space for {name}: other downloads hold data.cache_gb ({self.max_bytes} bytes)"
                )
            time.sleep(RESERVE_POLL_SECONDS)

    def _evict_lru(self, size: int, extra_free: int) -> bool:
        """Evict least recently used tars until `size` bytes fit and `extra_free` are free. Returns whether they fit."""
        used_bytes, tars = 0, []
        for path in self.folder.iterdir():
            with suppress(FileNotFoundError):
                if path.suffix == ".tar":
                    status = path.stat()
                    tars.append((status.st_mtime, status.st_size, path))
                elif path.name.startswith(TEMPORARY) and not self._remove_if_abandoned(path):
                    used_bytes += (path / "room").stat().st_size
        if used_bytes + size > self.max_bytes:
            return False  # even with all tars evicted
        used_bytes += sum(length for _, length, _ in tars)
        for _, length, path in sorted(tars):
            if used_bytes + size <= self.max_bytes and extra_free <= 0:
                break
            path.unlink(missing_ok=True)
            used_bytes, extra_free = used_bytes - length, extra_free - length
        return True

    def _remove_if_abandoned(self, temporary: Path) -> bool:
        """Remove the folder of a download that no process runs any more. Returns whether it was removed."""
        lock_name = f"{temporary.name[len(TEMPORARY) :]}.lock"
        with suppress(BlockingIOError), self._file_lock(lock_name, wait=False):
            shutil.rmtree(temporary, ignore_errors=True)
            return True
        return False

    @contextmanager
    def _file_lock(self, name: str, wait: bool = True) -> Iterator[None]:
        """Excludes other threads and processes. Raises BlockingIOError if the lock is held and `wait` is False."""
        with open(self.folder / name, "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield


def cached_path(cache: ShardCache, storage: Storage, entry: TarEntry) -> Path | None:
    """`cache.fetch`, or None with a warning if the cache has no space: then samples are read from the bucket."""
    try:
        return cache.fetch(storage, entry)
    except CacheFull as error:
        warnings.warn(f"{error}; its samples are read from {storage.uri} one by one", stacklevel=2)
        return None


def _is_cached(path: Path, entry: TarEntry) -> bool:
    """By size only: the download was verified, and each sample's CRC is checked when it is read."""
    try:
        return path.stat().st_size == entry.bytes
    except FileNotFoundError:
        return False


def _is_disk_full(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    return False
