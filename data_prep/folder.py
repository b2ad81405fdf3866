"""A folder of this machine, or of a shared file system, as a Storage."""

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

from data_prep.storage import TEMPORARY, DeniedKey, MissingKey, Storage, StorageError, Tagged, check_key

ABANDONED = 600.0  # seconds after its last byte: nobody writes this file any more


@dataclass(frozen=True)
class Folder(Storage):
    """`uri` is the absolute path. Files are written beside their place, synced, and renamed into it."""

    uri: str

    def path(self, key: str = "") -> Path:
        return self._file(key) if key else Path(self.uri)

    def _file(self, key: str) -> Path:
        return Path(self.uri, check_key(key))

    def read(self, key: str) -> bytes:
        with self._named(key, "read"):
            return self._file(key).read_bytes()

    def read_range(self, key: str, offset: int, size: int) -> bytes:
        with self._named(key, "read"), open(self._file(key), "rb", buffering=0) as file:
            data = os.pread(file.fileno(), size, offset)
        if len(data) != size:
            raise StorageError(
                f"{key} in {self.uri} ends before byte {offset + size}: it was cut; make it again"
            )
        return data

    def read_tagged(self, key: str) -> Tagged:
        with self._named(key, "read"), open(self._file(key), "rb") as file:
            data, modified = file.read(), os.fstat(file.fileno()).st_mtime
        return Tagged(data, hashlib.sha256(data).hexdigest(), modified, time.time())

    def write(self, key: str, data: bytes) -> None:
        with self._publishing(key) as file:
            file.write(data)

    def create(self, key: str, data: bytes) -> bool:
        target = self._file(key)
        if target.exists():
            return False
        with self._named(key, "write"):
            temporary = self._temporary(target)
            try:
                with open(temporary, "xb") as file:
                    file.write(data)
                    _to_disk(file)
                try:
                    os.link(temporary, target)  # refuses to replace, and shows the file whole
                except FileExistsError:
                    return False
                except OSError as error:
                    if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
                        raise
                    with _locked(target.parent):  # a file system without hard links
                        if target.exists():
                            return False
                        os.rename(temporary, target)
            finally:
                temporary.unlink(missing_ok=True)
            _sync_folder(target.parent)
        return True

    def replace_if(self, key: str, data: bytes, etag: str) -> bool:
        with self._named(key, "write"), _locked(self._file(key).parent):
            try:
                if self.read_tagged(key).etag != etag:
                    return False
            except MissingKey:
                return False
            self.write(key, data)
        return True

    def writing(self, key: str) -> AbstractContextManager[IO[bytes]]:
        return self._publishing(key)

    def copy(self, key: str, to: str) -> None:
        """A hard link where the file system has them: what is published is replaced, never written over."""
        source, target = self._file(key), self._file(to)
        with self._named(key, "copy"):
            temporary = self._temporary(target)
            try:
                os.link(source, temporary)
            except FileNotFoundError:
                raise
            except OSError:
                self.upload(source, to)
            else:
                os.replace(temporary, target)  # does nothing where both are the same file already
                temporary.unlink(missing_ok=True)

    def upload(self, path: Path, key: str) -> None:
        with open(path, "rb") as source, self._publishing(key) as file:
            shutil.copyfileobj(source, file, 1 << 20)

    def download(self, key: str, path: Path) -> None:
        if not self.exists(key):
            raise MissingKey(f"{key} is not in {self.uri}")
        Folder(str(path.parent)).upload(self._file(key), path.name)

    def size(self, key: str) -> int | None:
        path = self._file(key)
        return path.stat().st_size if path.is_file() else None

    def list(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        with self._named(prefix or "the folder", "list"):
            yield from _walk(self.path(prefix), f"{prefix}/" if prefix else "")

    def delete(self, key: str) -> None:
        with self._named(key, "delete"):
            self._file(key).unlink(missing_ok=True)

    def delete_tree(self, prefix: str) -> None:
        with self._named(prefix, "delete"), suppress(FileNotFoundError):
            shutil.rmtree(self._file(prefix))

    def tidy(self) -> None:
        for folder, _, names in os.walk(self.uri):
            for name in (name for name in names if name.startswith(TEMPORARY)):
                with suppress(FileNotFoundError):
                    path = os.path.join(folder, name)
                    if time.time() - os.stat(path).st_mtime > ABANDONED:
                        os.unlink(path)

    def sub(self, prefix: str) -> Folder:
        return Folder(str(self._file(prefix)))

    def check_writable(self) -> None:
        probe = f"{TEMPORARY}{uuid.uuid4().hex}"
        self.write(probe, b"probe")
        self.delete(probe)

    def _temporary(self, target: Path) -> Path:
        """An unused name beside the target; its folder is made."""
        target.parent.mkdir(parents=True, exist_ok=True)
        return target.parent / f"{TEMPORARY}{uuid.uuid4().hex}"

    @contextmanager
    def _publishing(self, key: str) -> Iterator[IO[bytes]]:
        """A file that becomes `key` when the block ends well, and vanishes when it does not."""
        target = self._file(key)
        with self._named(key, "write"):
            temporary = self._temporary(target)
            try:
                with open(temporary, "xb") as file:
                    yield file
                    _to_disk(file)
                os.replace(temporary, target)
            finally:
                temporary.unlink(missing_ok=True)
            _sync_folder(target.parent)

    @contextmanager
    def _named(self, key: str, what: str) -> Iterator[None]:
        """Operating-system errors as one line that names the key and the mend."""
        try:
            yield
        except StorageError:
            raise
        except FileNotFoundError as error:
            raise MissingKey(f"{key} is not in {self.uri}") from error
        except (PermissionError, NotADirectoryError, IsADirectoryError) as error:
            kind = DeniedKey if what == "read" else StorageError
            raise kind(
                f"cannot {what} {key} in {self.uri}: {error.strerror}; check the folder's owner and rights"
            ) from error
        except OSError as error:
            mends = {
                errno.ENOSPC: "the disk is full; free some space or choose another storage",
                errno.EDQUOT: "the disk quota is used up; free some space or choose another storage",
                errno.EROFS: "the file system is read-only; choose another storage",
                errno.ENAMETOOLONG: "the name is too long for this file system",
            }
            reason = mends.get(error.errno or 0, error.strerror or str(error))
            raise StorageError(f"cannot {what} {key} in {self.uri}: {reason}") from error


def _walk(folder: Path | str, inside: str) -> Iterator[tuple[str, int]]:
    """A folder's files in the order of their keys, one folder in memory at a time; links to folders are not entered."""
    try:
        with os.scandir(folder) as found:
            entries = sorted(
                (f"{entry.name}/" if entry.is_dir(follow_symlinks=False) else entry.name, entry.path)
                for entry in found
            )
    except FileNotFoundError:  # gone meanwhile, or never there: nothing to list
        return
    for name, path in entries:
        if name.endswith("/"):
            yield from _walk(path, inside + name)
        elif not name.startswith(TEMPORARY):
            with suppress(FileNotFoundError):
                status = os.stat(path)
                if stat.S_ISREG(status.st_mode):
                    yield inside + name, status.st_size


def _to_disk(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time in this folder; the lock dies with its holder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
