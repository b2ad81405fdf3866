"""A bucket as Ray writes to it: Arrow's file system over our own storage.

Arrow's S3 client gives up after three tries, or with checksums that not every server takes; ours outlasts a server
that is away for a minute. Folders need none of this.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import IO, Any, NoReturn

import pyarrow as pa
from pyarrow.fs import FileInfo, FileSelector, FileSystem, FileSystemHandler, FileType, PyFileSystem

from data_prep.storage import Storage


def ray_storage(storage: Storage, folder: str) -> tuple[str, FileSystem | None]:
    """How Ray names a folder of our storage: a path, or a key with a file system for it."""
    path = storage.path(folder)
    if path is not None:
        return str(path), None
    return folder, PyFileSystem(StorageHandler(storage))


class StorageHandler(FileSystemHandler):
    """Paths are keys. There are no empty directories: one is whatever keys begin with."""

    def __init__(self, storage: Storage) -> None:
        super().__init__()
        self.storage = storage

    def __reduce__(self) -> tuple[Any, ...]:
        return StorageHandler, (self.storage,)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StorageHandler) and other.storage == self.storage

    def __ne__(self, other: object) -> bool:
        return not self == other

    def get_type_name(self) -> str:
        return "inpaint"

    def normalize_path(self, path: str) -> str:
        return path.strip("/")

    def get_file_info(self, paths: Iterable[str]) -> list[FileInfo]:
        return [self._info(self.normalize_path(path)) for path in paths]

    def _info(self, path: str) -> FileInfo:
        size = self.storage.size(path) if path else None
        if size is not None:
            return FileInfo(path, FileType.File, size=size)
        inside = next(iter(self.storage.list(path)), None)
        return FileInfo(path, FileType.NotFound if inside is None else FileType.Directory)

    def get_file_info_selector(self, selector: FileSelector) -> list[FileInfo]:
        base = self.normalize_path(selector.base_dir)
        start = f"{base}/" if base else ""
        found: dict[str, FileInfo] = {}
        for key, size in self.storage.list(base):
            names = key.removeprefix(start).split("/")
            for depth in range(1, len(names) if selector.recursive else min(len(names), 2)):
                path = start + "/".join(names[:depth])
                found[path] = FileInfo(path, FileType.Directory)
            if selector.recursive or len(names) == 1:
                found[key] = FileInfo(key, FileType.File, size=size)
        if not found and not selector.allow_not_found:
            raise FileNotFoundError(f"{base} is not in {self.storage.uri}")
        return list(found.values())

    def create_dir(self, path: str, recursive: bool) -> None:
        pass

    def delete_dir(self, path: str) -> None:
        self.storage.delete_tree(self.normalize_path(path))

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        self.delete_dir(path)

    def delete_root_dir_contents(self) -> NoReturn:
        raise NotImplementedError("a storage is not emptied from here")

    def delete_file(self, path: str) -> None:
        self.storage.delete(self.normalize_path(path))

    def move(self, src: str, dest: str) -> None:
        self.copy_file(src, dest)
        self.delete_file(src)

    def copy_file(self, src: str, dest: str) -> None:
        self.storage.copy(self.normalize_path(src), self.normalize_path(dest))

    def open_input_stream(self, path: str) -> pa.NativeFile:
        return self.open_input_file(path)

    def open_input_file(self, path: str) -> pa.NativeFile:
        return pa.BufferReader(self.storage.read(self.normalize_path(path)))

    def open_output_stream(self, path: str, metadata: Mapping[str, str] | None) -> pa.PythonFile:
        return pa.PythonFile(_Upload(self.storage, self.normalize_path(path)), mode="w")

    def open_append_stream(self, path: str, metadata: Mapping[str, str] | None) -> NoReturn:
        raise NotImplementedError("objects of a bucket cannot be appended to")


class _Upload:
    """A file that is in the storage once it is closed."""

    def __init__(self, storage: Storage, key: str) -> None:
        self._writing = storage.writing(key)
        self._file: IO[bytes] = self._writing.__enter__()
        self.closed = False

    def write(self, data: Any) -> int:
        return self._file.write(data)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._writing.__exit__(None, None, None)
