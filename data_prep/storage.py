"""Folders and buckets behind one small interface: the only module that knows which is which.

Keys are relative posix paths. Everything that is written appears whole or not at all.
"""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO, NamedTuple

TEMPORARY = ".tmp-"  # the start of names that `list` hides: files not yet published


class StorageError(RuntimeError):
    """One line: what failed, on which key of which storage, and how to mend it."""


class MissingKey(StorageError, FileNotFoundError):
    """There is nothing under this key."""


class DeniedKey(StorageError, PermissionError):
    """This key exists and may not be read."""


class BadKey(StorageError, ValueError):
    """The key is no relative path inside the storage."""


class Tagged(NamedTuple):
    """An object with what `replace_if` and leases need; both times in seconds since 1970, by the server's clock."""

    data: bytes
    etag: str
    modified: float
    server_now: float


def check_key(key: str) -> str:
    """The key itself, or BadKey: absolute, empty, with '..', '.', '//' or a NUL."""
    if not key or "\0" in key or any(part in ("", ".", "..") for part in key.split("/")):
        raise BadKey(f"{key!r} is no key: use a relative path without '..', '.' or empty parts")
    return key


def open_storage(uri: str | Path) -> Storage:
    """The storage at a folder or at s3://bucket/prefix; nothing is created or asked before the first use."""
    text = str(uri)
    if text.startswith("s3://"):
        from data_prep.bucket import open_bucket  # here, as boto3 takes half a second to import

        return open_bucket(text)
    if "://" in text:
        raise ValueError(f"storage {text!r}: only folders and s3://bucket/prefix are known")
    from data_prep.folder import Folder  # here, as it builds on this module

    return Folder(str(Path(text).expanduser().absolute()))


class Storage(ABC):
    """Bytes under keys. Frozen and picklable, so that it can travel to where the work is done."""

    uri: str

    @abstractmethod
    def read(self, key: str) -> bytes:
        """The whole object; MissingKey when there is none."""

    @abstractmethod
    def read_range(self, key: str, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on; StorageError when the object is shorter."""

    @abstractmethod
    def read_tagged(self, key: str) -> Tagged:
        """The object with its tag and times."""

    @abstractmethod
    def write(self, key: str, data: bytes) -> None:
        """Publish the object, replacing what is there."""

    @abstractmethod
    def create(self, key: str, data: bytes) -> bool:
        """Publish the object unless there is one already; False when there was."""

    @abstractmethod
    def replace_if(self, key: str, data: bytes, etag: str) -> bool:
        """Publish the object only while the present one still has `etag`; False when it changed or is gone."""

    @abstractmethod
    def upload(self, path: Path, key: str) -> None:
        """Publish a local file."""

    def writing(self, key: str) -> AbstractContextManager[IO[bytes]]:
        """A file, never whole in memory, that becomes the object when the block ends well."""
        return _uploading(self, key)

    @abstractmethod
    def copy(self, key: str, to: str) -> None:
        """The object under another key too, without moving its bytes through this process where that can be."""

    @abstractmethod
    def download(self, key: str, path: Path) -> None:
        """Copy an object to a local file, which appears whole."""

    @abstractmethod
    def size(self, key: str) -> int | None:
        """Bytes, or None when there is no such object."""

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        """(key, bytes) of everything under the folder `prefix`, in the order of the keys, without unpublished files;
        as they are found: never all of them in memory."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove the object if it is there."""

    @abstractmethod
    def sub(self, prefix: str) -> Storage:
        """The storage inside this one at a folder."""

    @abstractmethod
    def check_writable(self) -> None:
        """Write and remove a small object; StorageError in one line when that fails."""

    def exists(self, key: str) -> bool:
        return self.size(key) is not None

    def delete_tree(self, prefix: str) -> None:
        """Remove everything under the folder `prefix`, one by one: not every server can delete in bulk."""
        for key, _ in self.list(check_key(prefix)):
            self.delete(key)

    def tidy(self) -> None:  # noqa: B027
        """Remove what killed writers left unpublished; a bucket has none of it."""

    def path(self, key: str = "") -> Path | None:
        """The local path of a key; None in a bucket."""
        return None


@contextmanager
def _uploading(storage: Storage, key: str) -> Iterator[IO[bytes]]:
    with tempfile.NamedTemporaryFile(prefix=TEMPORARY) as file:
        yield file  # type: ignore[misc]
        file.flush()
        storage.upload(Path(file.name), key)
