"""The small files of a storage, such as manifests: listed at each refresh, read again only when they have changed.

One listing per folder says which files are new or changed, in a bucket too. What was decoded from the others is kept, so
a refresh of many finished runs reads almost nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from data_prep.storage import MissingKey, Storage

T = TypeVar("T")
Decode = Callable[[bytes, str], T]
"""(text of a file, its key) -> value; ValueError if the file is damaged. A function of a module: its identity counts."""


class StorageFiles:
    """The files of some folders of a storage as they were at the last `list_folder`."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.fingerprints: dict[str, dict[str, str]] = {}
        """folder -> {name in it: fingerprint}"""
        self._groups: dict[str, dict[str, list[str]]] = {}
        """folder -> {folder in it: names in that}"""
        self._decoded: dict[str, dict[Callable[..., Any], tuple[str, Any]]] = {}
        """key -> {function: (fingerprint, value or ValueError)}"""

    def list_folder(self, folder: str) -> None:
        """List a folder again. One that does not exist is empty."""
        found = dict(self.storage.subfolder(folder).list_fingerprints())
        for name in self.fingerprints.get(folder, {}).keys() - found.keys():
            self._decoded.pop(f"{folder}/{name}", None)
        self.fingerprints[folder] = found
        groups: dict[str, list[str]] = {}
        for name in found:
            group, _, rest = name.partition("/")
            groups.setdefault(group, []).append(rest)
        self._groups[folder] = groups

    def names(self, folder: str) -> list[str]:
        """The names in a listed folder, sorted."""
        return list(self.fingerprints[folder])

    def names_below(self, folder: str, group: str) -> list[str]:
        """The names in the folder `group` of a listed folder, sorted, relative to it."""
        return [name for name in self._groups[folder].get(group, ()) if name]

    def exists(self, folder: str, name: str) -> bool:
        return name in self.fingerprints[folder]

    def decoded(self, folder: str, name: str, decode: Decode[T]) -> T:
        """What `decode` makes of a listed file. Raises its ValueError, and StorageError if the file cannot be read."""
        return self._remember(folder, name, decode, lambda key: decode(self.storage.read(key), key))

    def computed(self, folder: str, name: str, function: Callable[[Storage, str], T]) -> T:
        """The same for a function that reads the file, or a part of it, itself: it gets the storage and the key."""
        return self._remember(folder, name, function, lambda key: function(self.storage, key))

    def _remember(self, folder: str, name: str, function: Callable[..., T], call: Callable[[str], T]) -> T:
        key, fingerprint = f"{folder}/{name}", self.fingerprints[folder].get(name)
        if fingerprint is None:
            raise MissingKey(f"{key} is not in {self.storage.uri}")
        known = self._decoded.setdefault(key, {})
        seen = known.get(function)
        if seen is None or seen[0] != fingerprint:
            try:
                value: Any = call(key)
            except ValueError as error:
                value = error
            known[function] = seen = (fingerprint, value)
        if isinstance(seen[1], ValueError):
            raise seen[1]
        result: T = seen[1]
        return result

    def state(self, folders: Iterable[str]) -> tuple[object, ...]:
        """Differs when a file of these listed folders was written, made or deleted."""
        return tuple((folder, *self.fingerprints[folder].items()) for folder in folders)
