"""The file system through which Ray writes to a bucket: Arrow's interface over our own storage.

Arrow's S3 client gives up after three tries, and sends checksums that some servers reject. Ours keeps retrying while a
server is away for a minute. Local folders do not need this.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import IO, Any, NoReturn

import pyarrow as pa
from pyarrow.fs import FileInfo, FileSelector, FileSystem, FileSystemHandler, FileType, PyFileSystem

from data_prep.storage import Storage


def ray_storage_location(storage: Storage, folder: str) -> tuple[str, FileSystem | None]:
    """Ray's storage_path and storage_filesystem for a folder of our storage; no file system for a local folder."""
    path = storage.local_path(folder)
    if path is not None:
        return str(path), None
    return folder, PyFileSystem(StorageFileSystemHandler(storage))


class StorageFileSystemHandler(FileSystemHandler):
    """Paths are keys. A directory is a common prefix of keys, so none is empty."""

    def __init__(self, storage: Storage) -> None:
        super().__init__()
        self.storage = storage

    def __reduce__(self) -> tuple[Any, ...]:
        return StorageFileSystemHandler, (self.storage,)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StorageFileSystemHandler) and other.storage == self.storage

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
        first_key = next(iter(self.storage.list(path)), None)
        return FileInfo(path, FileType.NotFound if first_key is None else FileType.Directory)

    def get_file_info_selector(self, selector: FileSelector) -> list[FileInfo]:
        base = self.normalize_path(selector.base_dir)
        prefix = f"{base}/" if base else ""
        infos: dict[str, FileInfo] = {}
        for key, size in self.storage.list(base):
            names = key.removeprefix(prefix).split("/")
            for depth in range(1, len(names) if selector.recursive else min(len(names), 2)):
                path = prefix + "/".join(names[:depth])
                infos[path] = FileInfo(path, FileType.Directory)
            if selector.recursive or len(names) == 1:
                infos[key] = FileInfo(key, FileType.File, size=size)
        if not infos and not selector.allow_not_found:
            raise FileNotFoundError(f"{base} is not in {self.storage.uri}")
        return list(infos.values())

    def create_dir(self, path: str, recursive: bool) -> None:
        pass

    def delete_dir(self, path: str) -> None:
        self.storage.delete_tree(self.normalize_path(path))

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        self.delete_dir(path)

    def delete_root_dir_contents(self) -> NoReturn:
        raise NotImplementedError("the root of a storage cannot be emptied")

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
        return pa.PythonFile(_UploadStream(self.storage, self.normalize_path(path)), mode="w")

    def open_append_stream(self, path: str, metadata: Mapping[str, str] | None) -> NoReturn:
        raise NotImplementedError("objects of a bucket cannot be appended to")


class _UploadStream:
    """A writable file that appears in the storage when it is closed."""

    def __init__(self, storage: Storage, key: str) -> None:
        self._upload = storage.open_for_write(key)
        self._file: IO[bytes] = self._upload.__enter__()
        self.closed = False

    def write(self, data: Any) -> int:
        return self._file.write(data)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._upload.__exit__(None, None, None)
