"""Checks that a command can read its inputs and write its outputs, made before it works for minutes."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def check_writable_file(path: str | Path, option: str, create_parents: bool = False) -> None:
    """Raise ValueError in one line that names `option` if a file cannot be written at `path`. `create_parents`: missing
    parent folders are fine, as the command creates them."""
    path = Path(path)
    try:
        if path.is_dir():
            raise ValueError(f"{option} {path} is a folder: name a file in it")
        path.lstat()
    except FileNotFoundError:
        pass
    except OSError as error:
        if not isinstance(error, NotADirectoryError):
            raise ValueError(f"{option} {path} cannot be written: {error.strerror or error}") from None
    _check_parent(path, option, create_parents)


def check_writable_folder(path: str | Path, option: str) -> None:
    """Raise ValueError in one line that names `option` if files cannot be written to the folder `path`. It need not
    exist."""
    path = Path(path)
    if path.is_dir():
        _try_writing(path, path, option)
    elif os.path.lexists(path):
        raise ValueError(f"{option} {path} is not a folder: name another")
    else:
        _check_parent(path, option, create_parents=True)


def check_photo_source(uri: str, option: str) -> None:
    """Raise ValueError in one line that names `option` if `uri` has neither photographs nor shards."""
    from data_prep.manifest import MANIFEST
    from data_prep.sources import open_source
    from data_prep.storage import open_storage

    if uri == "bundled" or open_storage(uri).exists(MANIFEST):
        return
    try:
        next(iter(open_source(uri).list_photos()))
    except ValueError as error:
        raise ValueError(str(error).replace("data.source", option, 1)) from None


def _check_parent(path: Path, option: str, create_parents: bool) -> None:
    folder = path.parent
    while create_parents and not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        problem = "is not a folder" if os.path.lexists(folder) else "does not exist"
        raise ValueError(f"{option} {path}: the folder {folder} {problem}")
    _try_writing(folder, path, option)


def _try_writing(folder: Path, path: Path, option: str) -> None:
    """Write a file: permissions alone do not show read-only mounts, the rules of network drives, or a full disk."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0")
            file.flush()
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(f"{option} {path}: the folder {folder} cannot be written to ({reason})") from None
