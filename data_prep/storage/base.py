"""The storage interface, its errors and the rules for keys.

Keys are relative POSIX paths. Writes are atomic.
"""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from data_prep.left_out import LeftOut

TEMPORARY = ".tmp-"  # prefix of unpublished files, which `list` hides


class StorageError(RuntimeError):
    """One line: what failed, the key and the storage, and what to do."""


class MissingKey(StorageError, FileNotFoundError):
    """There is no object under this key."""


class DeniedKey(StorageError, PermissionError):
    """This key exists and may not be read."""


class BadKey(StorageError, ValueError):
    """The key is not a relative path inside the storage."""


class ObjectWithEtag(NamedTuple):
    """An object with the ETag for `put_if_match`; times in seconds since 1970 by the server's clock."""

    data: bytes
    etag: str
    modified: float
    server_time: float


def check_key(key: str) -> str:
    """Returns the key. Raises BadKey if it is absolute or empty, or contains '..', '.', '//' or NUL."""
    if not key or "\0" in key or any(part in ("", ".", "..") for part in key.split("/")):
        raise BadKey(f"{key!r} is not a valid key: use a relative path without '..', '.' or empty parts")
    return key


class Storage(ABC):
    """Maps keys to bytes. Frozen and picklable, so that tasks can receive it."""

    uri: str

    @abstractmethod
    def read(self, key: str) -> bytes:
        """The whole object. Raises MissingKey."""

    @abstractmethod
    def read_range(self, key: str, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`. Raises StorageError if the object is shorter."""

    @abstractmethod
    def read_with_etag(self, key: str) -> ObjectWithEtag:
        """The object with its ETag and times. Raises MissingKey."""

    @abstractmethod
    def write(self, key: str, data: bytes) -> None:
        """Publish the object, replacing an existing one."""

    @abstractmethod
    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Publish the object unless one exists. Returns whether it was written."""

    @abstractmethod
    def put_if_match(self, key: str, data: bytes, etag: str) -> bool:
        """Replace the object if its ETag is still `etag`. Returns whether it was written."""

    @abstractmethod
    def upload(self, path: Path, key: str) -> None:
        """Publish a local file."""

    def open_for_write(self, key: str) -> AbstractContextManager[IO[bytes]]:
        """A file that is published when the block ends without an error; it is never whole in memory."""
        return _upload_on_exit(self, key)

    @abstractmethod
    def copy(self, key: str, to: str) -> None:
        """Copy an object to another key; where possible, without moving its bytes through this process."""

    @abstractmethod
    def download(self, key: str, path: Path) -> None:
        """Copy an object to a local file, atomically. Raises MissingKey."""

    @abstractmethod
    def size(self, key: str) -> int | None:
        """Bytes, or None if there is no such object."""

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        """(key, bytes) of all published files under the folder `prefix`, sorted by key. Lazy: never all in memory."""

    @abstractmethod
    def list_user_files(self, left_out: LeftOut | None = None) -> Iterator[tuple[str, int]]:
        """(key, bytes) of the files that users have put here, sorted by key. Follows a folder's symbolic links.

        Files that cannot be photographs by their name or kind (see left_out.py and walk.py) are added to `left_out`.
        """

    @abstractmethod
    def list_fingerprints(self) -> Iterator[tuple[str, str]]:
        """(key, fingerprint) of the files of `list_user_files`; a changed file has another fingerprint (size and time,
        or size and ETag)."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove the object if it exists."""

    @abstractmethod
    def subfolder(self, prefix: str) -> Storage:
        """The storage at a folder inside this one."""

    @abstractmethod
    def check_writable(self) -> None:
        """Write and remove a small object. Raises StorageError."""

    def exists(self, key: str) -> bool:
        return self.size(key) is not None

    def delete_tree(self, prefix: str) -> None:
        """Remove everything under the folder `prefix`, one by one: not every server can delete in bulk."""
        for key, _ in self.list(check_key(prefix)):
            self.delete(key)

    def remove_temporary_files(self) -> None:  # noqa: B027
        """Remove unpublished files of killed writers; a bucket has none."""

    def local_path(self, key: str = "") -> Path | None:
        """The local path of a key; None in a bucket."""
        return None


@contextmanager
def _upload_on_exit(storage: Storage, key: str) -> Iterator[IO[bytes]]:
    with tempfile.NamedTemporaryFile(prefix=TEMPORARY) as file:
        yield file  # type: ignore[misc]
        file.flush()
        storage.upload(Path(file.name), key)
