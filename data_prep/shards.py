"""Photographs -> webdataset tars with an index each, and one manifest. The same input gives the same bytes.

`pipelines` calls `plan_shards` for the partitions to write, runs `write_partition` in one task per partition, and then
calls `merge_partitions` once.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from data_prep.images import PhotoError
from data_prep.left_out import LeftOut, printable
from data_prep.manifest import (
    MANIFEST,
    MANIFEST_VERSION,
    SPLITS,
    Duplicate,
    Manifest,
    PartitionResult,
    Reject,
    ShardEntry,
    Split,
    content_digest,
    load_manifest,
    write_manifest,
)
from data_prep.partitions import (
    IO_THREADS,
    Partition,
    SourceListing,
    assign_partitions,
    read_partition_records,
    write_partition_record,
)
from data_prep.preprocess import ShardOptions, encode_photo
from data_prep.sampler import find_segment
from data_prep.sources import PhotoSource
from data_prep.storage import BadKey, DeniedKey, MissingKey, Storage
from data_prep.tars import TarWriter, index_name, open_tar_for_write, read_index, write_tar


def plan_shards(
    source: PhotoSource,
    out: Storage,
    options: ShardOptions,
    partition_size: int,
    left_out: LeftOut | None = None,
) -> tuple[list[Partition], dict[int, PartitionResult]]:
    """All partitions of a source, and by index the results of those that need not be written (again).

    Reuses the finished partitions of earlier and interrupted runs in `out`. The source's other files are added to
    `left_out`. Raises ValueError if `out` has shards of other options, or the source is empty.
    """
    previous = load_manifest(out) if out.exists(MANIFEST) else None
    if previous and previous.version != MANIFEST_VERSION:
        raise ValueError(
            f"{out.uri} has shards of release 0.1.0, which can be read but not added to: choose another folder"
        )
    if previous and (previous.options != options or previous.source != source.uri):
        wanted = {"source": source.uri, **asdict(options)}
        stored = {"source": previous.source, **asdict(previous.options)}
        name = next(name for name in wanted if wanted[name] != stored[name])
        raise ValueError(
            f"{out.uri} holds shards with {name} {stored[name]!r}, not {wanted[name]!r}: choose another folder"
        )
    listing = SourceListing(source, left_out)
    existing = read_partition_records(out, previous.partitions) if previous else []
    if None in existing:
        raise ValueError(
            f"partitions/{existing.index(None):05d}.json in {out.uri} is damaged: rebuild the shards"
        )
    partitions = assign_partitions(listing, [record[0] for record in existing if record], partition_size)
    sizes = dict(out.list())
    started = [p.index for p in partitions[len(existing) :] if p.record_key in sizes]
    records = existing + read_partition_records(out, started[-1] + 1 if started else 0, len(existing))
    records += [None] * (len(partitions) - len(records))
    removed = {
        name
        for partition, record in zip(partitions, existing)
        if record
        for name in {*record[0].names} - {*partition.names}
    }
    finished = {}
    for partition, record in zip(partitions, records, strict=True):
        if record is None or record[0] != partition:
            continue
        _, result = record
        if previous and partition.index < previous.partitions:
            result = _partition_result(previous, *record)
        complete = all(sizes.get(entry.name) == entry.bytes for entry in result.shards)
        if complete and not any(duplicate.duplicate_of in removed for duplicate in result.duplicates):
            finished[partition.index] = result
    return partitions, finished


def _partition_result(previous: Manifest, partition: Partition, result: PartitionResult) -> PartitionResult:
    """A partition's result after `merge_partitions` has removed duplicates across partitions."""
    names = set(partition.names)
    return PartitionResult(
        tuple(entry for entry in previous.shards if entry.partition == partition.index),
        result.rejects,
        tuple(duplicate for duplicate in previous.duplicates if duplicate.name in names),
    )


def write_partition(
    source: PhotoSource, partition: Partition, out: Storage, options: ShardOptions
) -> PartitionResult:
    """`write_partition_tars`, then the record that the partition is finished."""
    result = write_partition_tars(source, partition.names, partition.index, out, options)
    write_partition_record(out, partition, result)
    return result


def write_partition_tars(
    source: PhotoSource,
    names: Sequence[str],
    index: int,
    out: Storage,
    options: ShardOptions,
    progress: Callable[[int], None] | None = None,
) -> PartitionResult:
    """Write the photographs `names` as {split}-{index:05d}.tar (and -1.tar, -2.tar... beyond the size limit) with their
    indexes to `out`. One photograph is in memory at a time; `progress` is called with the number done.

    Returns the result for `merge_partitions`. Raises StorageError if the storage fails.
    """
    name_of_key: dict[str, str] = {}
    rejects: list[Reject] = []
    duplicates: list[Duplicate] = []
    with ExitStack() as stack:
        writers = {split: stack.enter_context(_SplitWriter(out, split, index, options)) for split in SPLITS}
        for done, name in enumerate(names, 1):
            try:
                data = source.read(name)
                key = hashlib.sha256(data).hexdigest()[:16]
                if key in name_of_key:
                    duplicates.append(Duplicate(name, name_of_key[key]))
                else:
                    encoded, suffix, shape = encode_photo(data, options)
                    name_of_key[key] = name
                    writer = writers[_assign_split(source.split_group(name), key, options)]
                    writer.add(key, encoded, suffix, name, shape)
            except (PhotoError, MissingKey, DeniedKey, BadKey) as error:
                rejects.append(Reject(name, str(error)))
            if progress:
                progress(done)
    shards = tuple(entry for writer in writers.values() for entry in writer.entries)
    return PartitionResult(shards, tuple(rejects), tuple(duplicates))


class _SplitWriter:
    """Context manager that writes the tars of one split of a partition, one after the other."""

    def __init__(self, out: Storage, split: Split, index: int, options: ShardOptions) -> None:
        self.out, self.split, self.index = out, split, index
        self.max_bytes = int(options.max_shard_mb * 1_000_000)
        self.entries: list[ShardEntry] = []
        self._open = ExitStack()
        self._tar: TarWriter | None = None
        self._extra_columns: dict[str, list] = {}

    def __enter__(self) -> _SplitWriter:
        return self

    def __exit__(self, *error: Any) -> None:
        if error[0] is None:
            self._finish_tar()
        else:
            self._open.__exit__(*error)

    def add(self, key: str, data: bytes, suffix: str, name: str, shape: tuple[int, int]) -> None:
        if self._tar and self._tar.size_with(len(data)) > self.max_bytes:
            self._finish_tar()
        if self._tar is None:
            self._extra_columns = {"shapes": [], "names": []}
            self._tar = self._open.enter_context(
                open_tar_for_write(self.out, self._tar_name, self._extra_columns)
            )
        self._tar.add(f"{key}.{suffix}", data)
        self._extra_columns["shapes"].append(shape)
        self._extra_columns["names"].append(name)

    @property
    def _tar_name(self) -> str:
        number = f"-{len(self.entries)}" if self.entries else ""
        return f"{self.split}-{self.index:05d}{number}.tar"

    def _finish_tar(self) -> None:
        if self._tar:
            self._open.close()
            entry = self._tar.entry(self._tar_name)
            self.entries.append(ShardEntry(**vars(entry), split=self.split, partition=self.index))
            self._tar = None


def empty_split_message(split: str, source: str) -> str:
    """Error text for a split without photographs."""
    hint = "lower data.val and data.test" if split == "train" else f"raise data.{split}"
    return f"the split {split} of {source} holds no photographs; give more, or {hint}"


def split_positions(source: PhotoSource, shards: Storage) -> list[float]:
    """Each photograph's position in [0, 1): test takes the lowest positions, then val, then train."""
    positions = []
    for entry in load_manifest(shards).shards:
        index = read_index(shards, entry.name)
        positions += [
            _split_position(source.split_group(name), key)
            for key, name in zip(index["keys"], index["names"], strict=True)
        ]
    return positions


def _split_position(group: str | None, key: str) -> float:
    digest = hashlib.sha256((group or key).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _assign_split(group: str | None, key: str, options: ShardOptions) -> Split:
    """Depends on a hash of the content or the group only, so a photograph stays in its split when others come or go."""
    position = _split_position(group, key)
    if position < options.test:
        return "test"
    return "val" if position < options.test + options.val else "train"


def merge_partitions(
    results: Sequence[PartitionResult],
    options: ShardOptions,
    source_uri: str,
    out: Storage,
    left_out: LeftOut | None = None,
) -> Manifest:
    """Merge the results, in the order of the partitions, into manifest.json, which is written last.

    A photograph in two partitions stays in the first. `left_out` is the one from `plan_shards`. Returns the manifest.
    Raises ValueError if no photograph is usable.
    """
    left_out = LeftOut() if left_out is None else left_out
    shards = [entry for result in results for entry in result.shards]
    rejects = [reject for result in results for reject in result.rejects]
    duplicates = [duplicate for result in results for duplicate in result.duplicates]
    for shard, first_names in _find_duplicates(shards, out).items():
        shards[shard], shard_duplicates = rewrite_without(out, shards[shard], first_names)
        duplicates += shard_duplicates
    shards = [entry for entry in shards if entry.count]
    if not shards:
        reason = f", first {rejects[0].name}: {rejects[0].reason}" if rejects else ""
        reason += f"; left out: {left_out}" if left_out.total else ""
        raise ValueError(
            f"data.source {source_uri} holds no usable photograph ({len(rejects)} rejects{printable(reason)})"
        )
    shards.sort(key=lambda entry: (SPLITS.index(entry.split), entry.name))
    manifest = Manifest(
        MANIFEST_VERSION,
        source_uri,
        options,
        content_digest(shards),
        {split: sum(entry.count for entry in shards if entry.split == split) for split in SPLITS},
        len(results),
        tuple(shards),
        tuple(rejects),
        tuple(duplicates),
        left_out.entries(),
    )
    write_manifest(out, manifest)
    current_files = {file for entry in shards for file in (entry.name, index_name(entry.name))}
    for key in [key for key, _ in out.list() if _SHARD_FILE.fullmatch(key) and key not in current_files]:
        out.delete(key)
    return manifest


_SHARD_FILE = re.compile(rf"({'|'.join(SPLITS)})-\d{{5,}}(-\w+)*\.(tar|json)")


def _find_duplicates(shards: Sequence[ShardEntry], out: Storage) -> dict[int, dict[str, str]]:
    """Photographs that an earlier shard has too: index of the shard -> {key: name of the first one}.

    Compares the keys as 64-bit integers: eight bytes per photograph.
    """

    def read_keys(entry: ShardEntry) -> np.ndarray:
        return np.array([int(key, 16) for key in read_index(out, entry.name)["keys"]], np.uint64)

    with ThreadPoolExecutor(IO_THREADS) as pool:
        shard_keys = list(pool.map(read_keys, shards))
    ends = np.cumsum([len(keys) for keys in shard_keys])
    all_keys = np.concatenate([np.empty(0, np.uint64), *shard_keys])
    order = np.argsort(all_keys, kind="stable")
    equal_to_next = np.flatnonzero(all_keys[order][1:] == all_keys[order][:-1])
    duplicates: dict[int, dict[str, str]] = {}
    first_name: dict[int, str] = {}  # position -> name of the first photograph with the same key
    for previous, position in zip(
        order[equal_to_next].tolist(), order[equal_to_next + 1].tolist(), strict=True
    ):
        if previous not in first_name:  # of three equal ones, the third refers to the first too
            first_name[previous] = _photo_name_at(shards, ends, previous, out)
        first_name[position] = first_name[previous]
        shard, _ = find_segment(ends, position)
        duplicates.setdefault(shard, {})[f"{int(all_keys[position]):016x}"] = first_name[previous]
    return duplicates


def _photo_name_at(shards: Sequence[ShardEntry], ends: np.ndarray, position: int, out: Storage) -> str:
    shard, row = find_segment(ends, position)
    name: str = read_index(out, shards[shard].name)["names"][row]
    return name


def rewrite_without(
    out: Storage, entry: ShardEntry, first_names: Mapping[str, str]
) -> tuple[ShardEntry, list[Duplicate]]:
    """Write the shard again without the samples whose keys are in `first_names` (key -> name of the photograph that is
    kept). Returns its entry and the duplicates.

    The new tar has another name, so that a task that still writes this partition cannot overwrite it.
    """
    index, new_name = read_index(out, entry.name), entry.name.removesuffix(".tar") + "-unique.tar"
    rows = [row for row, key in enumerate(index["keys"]) if key not in first_names]
    duplicates = [
        Duplicate(name, first_names[key])
        for key, name in zip(index["keys"], index["names"], strict=True)
        if key in first_names
    ]
    if not rows:
        return replace(entry, count=0), duplicates
    extra_columns = {column: [index[column][row] for row in rows] for column in ("shapes", "names")}
    suffixes = index["suffixes"]
    members = (
        (
            f"{index['keys'][row]}.{suffixes[row]}",
            out.read_range(entry.name, index["offsets"][row], index["sizes"][row]),
        )
        for row in rows
    )
    return replace(entry, **vars(write_tar(out, new_name, members, extra_columns))), duplicates
