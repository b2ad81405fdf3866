"""Walks a folder of user files: follows symbolic links, and counts and names everything that is not a file."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import suppress

from data_prep import left_out as kinds
from data_prep.left_out import LeftOut, is_companion, is_companion_folder
from data_prep.storage.base import TEMPORARY, StorageError

_BROKEN_LINK_ERRNOS = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
_ACCESS_ERRNOS = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)

FileIdentity = tuple[int, int] | str  # (device, inode), or the real path


def walk_user_files(root: str, left_out: LeftOut) -> Iterator[tuple[str, int]]:
    """(key, bytes) of every file under the folder `root`, sorted by key, one folder in memory at a time.

    Follows links to files and folders, also out of `root`. Walks each folder once, even if several links lead to it:
    under its real path if that is inside `root`, otherwise under the first key. So every loop ends. Files and folders
    that cannot be used are added to `left_out`. Raises OSError if `root` cannot be listed, StorageError if the file
    system fails further down.
    """
    visited: dict[FileIdentity, str] = {}
    real_root = os.path.realpath(root)
    with suppress(OSError):
        visited[_file_identity(root)] = ""
    # of the open folders: key, whether reached by a link, remaining entries
    levels = [("", False, iter(_sorted_entries(root, "", left_out)))]
    while levels:
        key_prefix, reached_by_link, entries = levels[-1]
        for name, path in entries:
            key = key_prefix + name
            if not name.endswith("/"):
                if is_companion(name):
                    left_out.add(kinds.COMPANIONS, key)
                elif name.startswith(TEMPORARY):
                    left_out.add(kinds.UNFINISHED, key)
                elif (size := _file_size(key, path, left_out)) is not None:
                    yield key, size
            elif is_companion_folder(name[:-1]):
                left_out.add(kinds.COMPANIONS, key)
            else:
                is_link = os.path.islink(path)
                if _should_enter(key, path, is_link, reached_by_link, visited, real_root, left_out):
                    levels.append(
                        (key, reached_by_link or is_link, iter(_sorted_entries(path, key, left_out)))
                    )
                    break
        else:
            levels.pop()


def _sorted_entries(folder: str, key_prefix: str, left_out: LeftOut) -> list[tuple[str, str]]:
    """(name, path) of a folder's entries, sorted by key. The names of folders, and of links to folders, end in '/'."""
    try:
        with os.scandir(folder) as entries:
            return sorted(
                (f"{entry.name}/" if _is_folder(entry) else entry.name, entry.path) for entry in entries
            )
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):  # removed in the meantime, or never created
            return []
        if not key_prefix:
            raise
        _record_or_raise(key_prefix, folder, error, left_out)
        return []


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # of a link; _file_size reports it
        return False


def _file_size(key: str, path: str, left_out: LeftOut) -> int | None:
    """Bytes; None for what is not a regular file or is not accessible, which is added to `left_out`."""
    try:
        status = os.stat(path)
    except OSError as error:
        _record_or_raise(key, path, error, left_out)
        return None
    if not stat.S_ISREG(status.st_mode):
        left_out.add(kinds.SPECIAL, key, file_kind(status.st_mode))
        return None
    return status.st_size


def _should_enter(
    key: str,
    path: str,
    is_link: bool,
    reached_by_link: bool,
    visited: dict[FileIdentity, str],
    real_root: str,
    left_out: LeftOut,
) -> bool:
    """Whether to walk this folder: always if no link leads to it, else if it is outside the root and not yet visited."""
    try:
        identity = _file_identity(path)
    except OSError as error:
        _record_or_raise(key, path, error, left_out)
        return False
    first_key = _key_inside(os.path.realpath(path), real_root) if is_link else None
    if first_key is None and (is_link or reached_by_link):
        first_key = visited.get(identity)
    if first_key is not None:
        left_out.add(kinds.REPEATED, key, f"the same folder as {first_key or 'the source itself'}")
        return False
    visited.setdefault(identity, key)
    return True


def _key_inside(real_path: str, real_root: str) -> str | None:
    """The key of a folder inside the root, '' for the root itself, None for a folder that the walk does not reach."""
    if real_path == real_root:
        return ""
    inside = real_path.removeprefix(real_root.rstrip("/") + "/")
    if inside == real_path or any(is_companion_folder(part) for part in inside.split("/")):
        return None
    return f"{inside}/"


def _file_identity(path: str) -> FileIdentity:
    status = os.stat(path)
    if status.st_ino:
        return status.st_dev, status.st_ino
    return os.path.realpath(path)  # on a file system without inode numbers


def _record_or_raise(key: str, path: str, error: OSError, left_out: LeftOut) -> None:
    """Adds an inaccessible entry to `left_out`. Raises StorageError if the file system fails, as existing photographs
    would be lost."""
    if error.errno in _ACCESS_ERRNOS:
        left_out.add(kinds.UNREADABLE, key, error.strerror or "")
    elif error.errno not in _BROKEN_LINK_ERRNOS:
        raise StorageError(
            f"cannot list {path}: {error.strerror}; check the disk or mount that it is on"
        ) from error
    else:
        with suppress(OSError):  # not a link: removed in the meantime
            left_out.add(kinds.BROKEN, key, f"leads to {os.readlink(path)}")


def file_kind(mode: int) -> str:
    """The kind of a special file by its st_mode: 'a named pipe', 'a socket' or 'a device'."""
    if stat.S_ISFIFO(mode):
        return "a named pipe"
    return "a socket" if stat.S_ISSOCK(mode) else "a device"
