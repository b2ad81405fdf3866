"""Folders for tests of listing and sharding."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_prep.left_out import LeftOut
from data_prep.manifest import Manifest
from data_prep.preprocess import ShardOptions
from data_prep.shards import merge_partitions, plan_shards, write_partition
from data_prep.sources import open_source
from data_prep.storage import open_storage

NOBODY_UID = 65534
OPTIONS = ShardOptions(size=32, format="png", val=0.2, test=0)


@contextmanager
def as_unprivileged_user() -> Iterator[None]:
    """Run as a user without root's rights, so that file permissions apply."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY_UID)
    try:
        yield
    finally:
        os.seteuid(0)


def write_files(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    return folder


def list_source(folder: Path) -> tuple[list[str], dict[str, list[str]]]:
    """The names of the photographs, and by kind those of the entries that are left out."""
    left_out = LeftOut()
    names = [name for name, _ in open_source(str(folder)).list_photos(left_out)]
    assert names == sorted(names)
    entries = left_out.entries()
    assert all(entry.count == len(entry.names) for entry in entries.values())
    return names, {kind: list(entry.names) for kind, entry in entries.items()}


def shard_folder(source: Path, out: Path) -> Manifest:
    """Run `inpaint shard` in this process."""
    photos, storage, left_out = open_source(str(source)), open_storage(out), LeftOut()
    partitions, results = plan_shards(photos, storage, OPTIONS, 5, left_out)
    for partition in partitions:
        if partition.index not in results:
            results[partition.index] = write_partition(photos, partition, storage, OPTIONS)
    ordered = [results[partition.index] for partition in partitions]
    return merge_partitions(ordered, OPTIONS, photos.uri, storage, left_out)
