"""A local folder, or one on a shared file system, as a Storage."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import stat
import time
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from data_prep.left_out import LeftOut
from data_prep.os_errors import explain_os_error
from data_prep.storage.base import (
    TEMPORARY,
    DeniedKey,
    MissingKey,
    ObjectWithEtag,
    Storage,
    StorageError,
    check_key,
)
from data_prep.storage.walk import file_kind, walk_user_files

STALE_TEMPORARY_SECONDS = 600.0  # after its last write, a temporary file counts as abandoned


@dataclass(frozen=True)
class LocalStorage(Storage):
    """`uri` is the absolute path. Writes go to a temporary file in the same folder, then fsync and rename."""

    uri: str

    def local_path(self, key: str = "") -> Path:
        return self._full_path(key) if key else Path(self.uri)

    def _full_path(self, key: str) -> Path:
        return Path(self.uri, check_key(key))

    def read(self, key: str) -> bytes:
        path = self._full_path(key)
        with self._wrap_errors(key, "read"):
            mode = os.stat(path).st_mode
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # opening a named pipe would block for ever
                raise DeniedKey(f"cannot read {key} in {self.uri}: it is {file_kind(mode)}, not a file")
            return path.read_bytes()

    def read_range(self, key: str, offset: int, size: int) -> bytes:
        with self._wrap_errors(key, "read"), open(self._full_path(key), "rb", buffering=0) as file:
            data = os.pread(file.fileno(), size, offset)
        if len(data) != size:
            raise StorageError(
                f"{key} in {self.uri} ends before byte {offset + size}: it is truncated; rebuild it"
            )
        return data

    def read_with_etag(self, key: str) -> ObjectWithEtag:
        with self._wrap_errors(key, "read"), open(self._full_path(key), "rb") as file:
            data, modified = file.read(), os.fstat(file.fileno()).st_mtime
        return ObjectWithEtag(data, hashlib.sha256(data).hexdigest(), modified, time.time())

    def write(self, key: str, data: bytes) -> None:
        with self._atomic_write(key) as file:
            file.write(data)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        target = self._full_path(key)
        if target.exists():
            return False
        with self._wrap_errors(key, "write"):
            temporary = self._temporary_path(target)
            try:
                with open(temporary, "xb") as file:
                    file.write(data)
                    _fsync_file(file)
                try:
                    os.link(temporary, target)  # fails if the target exists, and publishes the whole file
                except FileExistsError:
                    return False
                except OSError as error:
                    if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
                        raise
                    with _folder_lock(target.parent):  # a file system without hard links
                        if target.exists():
                            return False
                        os.rename(temporary, target)
            finally:
                temporary.unlink(missing_ok=True)
            _fsync_folder(target.parent)
        return True

    def put_if_match(self, key: str, data: bytes, etag: str) -> bool:
        with self._wrap_errors(key, "write"), _folder_lock(self._full_path(key).parent):
            try:
                if self.read_with_etag(key).etag != etag:
                    return False
            except MissingKey:
                return False
            self.write(key, data)
        return True

    def open_for_write(self, key: str) -> AbstractContextManager[IO[bytes]]:
        return self._atomic_write(key)

    def copy(self, key: str, to: str) -> None:
        """Makes a hard link where the file system has them: published files are replaced, never modified."""
        source, target = self._full_path(key), self._full_path(to)
        with self._wrap_errors(key, "copy"):
            temporary = self._temporary_path(target)
            try:
                os.link(source, temporary)
            except FileNotFoundError:
                raise
            except OSError:
                self.upload(source, to)
            else:
                os.replace(temporary, target)  # does nothing if both are the same file already
                temporary.unlink(missing_ok=True)

    def upload(self, path: Path, key: str) -> None:
        with open(path, "rb") as source, self._atomic_write(key) as file:
            shutil.copyfileobj(source, file, 1 << 20)

    def download(self, key: str, path: Path) -> None:
        if not self.exists(key):
            raise MissingKey(f"{key} is not in {self.uri}")
        LocalStorage(str(path.parent)).upload(self._full_path(key), path.name)

    def size(self, key: str) -> int | None:
        with self._wrap_errors(key, "read"):
            try:
                status = os.stat(self._full_path(key))
            except (FileNotFoundError, NotADirectoryError):
                return None
        return status.st_size if stat.S_ISREG(status.st_mode) else None

    def list(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        with self._wrap_errors(prefix or "the folder", "list"):
            yield from _walk_files(self.local_path(prefix), f"{prefix}/" if prefix else "")

    def list_user_files(self, left_out: LeftOut | None = None) -> Iterator[tuple[str, int]]:
        with self._wrap_errors("the folder", "list"):
            yield from walk_user_files(self.uri, LeftOut() if left_out is None else left_out)

    def list_fingerprints(self) -> Iterator[tuple[str, str]]:
        for key, size in self.list_user_files():
            with suppress(FileNotFoundError):
                yield key, f"{size}-{os.stat(os.path.join(self.uri, key)).st_mtime_ns}"

    def delete(self, key: str) -> None:
        with self._wrap_errors(key, "delete"):
            self._full_path(key).unlink(missing_ok=True)

    def delete_tree(self, prefix: str) -> None:
        with self._wrap_errors(prefix, "delete"), suppress(FileNotFoundError):
            shutil.rmtree(self._full_path(prefix))

    def remove_temporary_files(self) -> None:
        for folder, _, names in os.walk(self.uri):
            for name in (name for name in names if name.startswith(TEMPORARY)):
                with suppress(FileNotFoundError):
                    path = os.path.join(folder, name)
                    if time.time() - os.stat(path).st_mtime > STALE_TEMPORARY_SECONDS:
                        os.unlink(path)

    def subfolder(self, prefix: str) -> LocalStorage:
        return LocalStorage(str(self._full_path(prefix)))

    def check_writable(self) -> None:
        probe = f"{TEMPORARY}{uuid.uuid4().hex}"
        self.write(probe, b"probe")
        self.delete(probe)

    def _temporary_path(self, target: Path) -> Path:
        """An unused path beside the target. Creates their folder."""
        target.parent.mkdir(parents=True, exist_ok=True)
        return target.parent / f"{TEMPORARY}{uuid.uuid4().hex}"

    @contextmanager
    def _atomic_write(self, key: str) -> Iterator[IO[bytes]]:
        """A file that becomes `key` when the block ends without an error, and is removed otherwise."""
        target = self._full_path(key)
        with self._wrap_errors(key, "write"):
            temporary = self._temporary_path(target)
            try:
                with open(temporary, "xb") as file:
                    yield file
                    _fsync_file(file)
                os.replace(temporary, target)
            finally:
                temporary.unlink(missing_ok=True)
            _fsync_folder(target.parent)

    @contextmanager
    def _wrap_errors(self, key: str, operation: str) -> Iterator[None]:
        """Turns an OSError into a StorageError that names the key and what to do."""
        key = "a file" if key.startswith(TEMPORARY) else key
        try:
            yield
        except StorageError:
            raise
        except FileNotFoundError as error:
            if operation == "write":
                raise StorageError(
                    f"cannot write {key} in {self.uri}: its folder cannot be created"
                ) from error
            raise MissingKey(f"{key} is not in {self.uri}") from error
        except OSError as error:
            denied = isinstance(error, PermissionError | NotADirectoryError | IsADirectoryError)
            denied = denied or error.errno in (errno.ELOOP, errno.ENAMETOOLONG)
            error_type = DeniedKey if operation == "read" and denied else StorageError
            raise error_type(f"cannot {operation} {key} in {self.uri}: {explain_os_error(error)}") from error


def _walk_files(folder: Path | str, key_prefix: str) -> Iterator[tuple[str, int]]:
    """(key, bytes) of a folder's files, sorted by key, one folder in memory at a time. Does not follow links to
    folders."""
    try:
        with os.scandir(folder) as directory:
            entries = sorted(
                (f"{entry.name}/" if entry.is_dir(follow_symlinks=False) else entry.name, entry.path)
                for entry in directory
            )
    except FileNotFoundError:  # removed in the meantime, or never created
        return
    for name, path in entries:
        if name.endswith("/"):
            yield from _walk_files(path, key_prefix + name)
        elif not name.startswith(TEMPORARY):
            with suppress(FileNotFoundError):
                status = os.stat(path)
                if stat.S_ISREG(status.st_mode):
                    yield key_prefix + name, status.st_size


def _fsync_file(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _fsync_folder(folder: Path) -> None:
    """Makes a rename survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _folder_lock(folder: Path) -> Iterator[None]:
    """Excludes other processes; the kernel releases the lock when its holder dies."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
