"""Checks shards, one Ray task per tar, and repairs them: damaged tars are rebuilt, and replaced once they are known to
have the same bytes as before."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import ray

from data_prep.edge_maps import EDGE_MANIFEST
from data_prep.manifest import Duplicate, Manifest, ShardEntry, load_manifest
from data_prep.partitions import Partition, read_partition_records
from data_prep.preprocess import ShardOptions, make_sample_decoder
from data_prep.shards import rewrite_without, write_partition_tars
from data_prep.sources import PhotoSource, open_source
from data_prep.storage import Storage, open_storage
from data_prep.tars import index_name, read_index
from data_prep.verify import (
    EdgeDataset,
    Finding,
    TarReport,
    check_edges,
    check_manifest,
    check_photographs,
    find_edge_datasets,
)
from pipelines.data.shard_tasks import make_edge_tars
from pipelines.ray_tasks import ProgressCallback, run_tasks


@dataclass(frozen=True)
class ShardCheck:
    """A shard folder and the edge datasets that are checked with it."""

    shards: Storage
    manifest: Manifest
    edge_datasets: tuple[EdgeDataset, ...]

    @classmethod
    def load(cls, shards: Storage, sigmas: Sequence[float] = ()) -> ShardCheck:
        """The photographs of a shard folder and its edges of `sigmas` (empty: all that exist).

        Raises ValueError if it is not a shard folder or has no such edges.
        """
        manifest = load_manifest(shards)
        datasets = find_edge_datasets(shards, manifest.digest)
        existing = {dataset.sigma for dataset in datasets}
        for sigma in sigmas:
            if sigma not in existing:
                listed = ", ".join(f"{other:g}" for other in sorted(existing)) or "none"
                raise ValueError(
                    f"{shards.uri} holds no edges of sigma {sigma:g} (there are: {listed}): make them with "
                    f"`inpaint edges {shards.uri} --sigma {sigma:g}`"
                )
        return cls(
            shards, manifest, tuple(dataset for dataset in datasets if not sigmas or dataset.sigma in sigmas)
        )

    def check_manifests(self) -> list[Finding]:
        """Problems of the manifests and the partition records, found without reading a tar. Raises ValueError if the
        photographs' manifest is too damaged for a check."""
        findings = check_manifest(self.shards, self.manifest)
        return findings + [
            Finding(EDGE_MANIFEST, "", dataset.problem, dataset.sigma)
            for dataset in self.edge_datasets
            if dataset.problem
        ]

    def check_tar(self, entry: ShardEntry) -> tuple[list[Finding], list[str]]:
        """(problems of one tar and its edge tars, its photographs' keys)."""
        report: TarReport = check_photographs(self.shards, entry, make_sample_decoder(self.manifest.options))
        findings = list(report.findings)
        for dataset in self.edge_datasets:
            if dataset.entries is not None:
                edge_entry = dataset.entries.get(entry.name)
                findings += check_edges(dataset.folder, edge_entry, entry, report, dataset.sigma).findings
        return findings, report.keys


def find_cross_tar_duplicates(keys: Sequence[tuple[str, list[str]]]) -> list[Finding]:
    """Photographs that are in more than one tar; `keys` are (tar, its keys)."""
    first_tar: dict[str, str] = {}
    findings = []
    for tar, tar_keys in keys:
        for key in tar_keys:
            if first_tar.setdefault(key, tar) != tar:
                findings.append(Finding(tar, key, f"is in {first_tar[key]} too"))
    return findings


def check_shards(check: ShardCheck, progress: ProgressCallback) -> list[Finding]:
    """Problems of all tars of a shard folder, one Ray task per tar; in the manifest's order."""
    entries = check.manifest.shards
    sizes = [entry.count for entry in entries]
    results = dict(run_tasks(_check_tar, check, entries, sizes, progress, "photographs"))
    findings = [finding for n in range(len(entries)) for finding in results[n][0]]
    return findings + find_cross_tar_duplicates(
        [(entry.name, results[n][1]) for n, entry in enumerate(entries)]
    )


@ray.remote(num_cpus=1)
def _check_tar(check: ShardCheck, entry: ShardEntry) -> tuple[list[Finding], list[str]]:
    return check.check_tar(entry)


def repair(
    check: ShardCheck, findings: Sequence[Finding], progress: ProgressCallback, root: str | None = None
) -> list[str]:
    """Rebuild the tars that `findings` name, byte for byte. Returns the reasons for those that could not be rebuilt.

    A photograph tar is replaced only if the source still gives the same bytes: losing one photograph is better than
    losing a shard. `root` is the folder to which a listing's names are relative.
    """
    reasons = _rebuild_photo_tars(
        check, {finding.shard for finding in findings if finding.sigma is None}, progress, root
    )
    for dataset in check.edge_datasets:
        names = {finding.shard for finding in findings if finding.sigma == dataset.sigma}
        for name in names - {EDGE_MANIFEST}:
            dataset.folder.delete(index_name(name))  # without its index, a tar does not count as finished
        if names:
            try:
                make_edge_tars(check.shards, {dataset.sigma: dataset.folder}, progress)
            except ValueError as error:  # a photograph tar is still damaged
                reasons.append(f"edges of sigma {dataset.sigma:g}: {getattr(error, 'cause', error)}")
    return reasons


def _rebuild_photo_tars(
    check: ShardCheck, names: set[str], progress: ProgressCallback, root: str | None
) -> list[str]:
    """Rebuild photograph tars, one Ray task per partition. Returns the reasons for those that could not be rebuilt."""
    options = check.manifest.options
    source = open_source(check.manifest.source, options.size, root)
    damaged: dict[int, list[ShardEntry]] = {}
    for entry in check.manifest.shards:
        if entry.name in names:
            damaged.setdefault(entry.partition, []).append(entry)
    if not damaged:
        return []
    shared = (check.shards, source, options, check.manifest.duplicates)
    sizes = [sum(entry.count for entry in entries) for entries in damaged.values()]
    results = sorted(run_tasks(_rebuild, shared, list(damaged.items()), sizes, progress, "photographs"))
    return [reason for _, reason in results if reason]


@ray.remote(num_cpus=1)
def _rebuild(
    shared: tuple[Storage, PhotoSource, ShardOptions, Sequence[Duplicate]],
    damaged: tuple[int, Sequence[ShardEntry]],
) -> str:
    with tempfile.TemporaryDirectory(prefix="inpaint-repair-") as folder:
        return rebuild_tars(*shared, *damaged, open_storage(folder))


def rebuild_tars(
    shards: Storage,
    source: PhotoSource,
    options: ShardOptions,
    duplicates: Sequence[Duplicate],
    partition_index: int,
    entries: Sequence[ShardEntry],
    scratch: Storage,
) -> str:
    """Rebuild the tars `entries` of a partition, first in `scratch` (a folder). Returns why they were not replaced, or "".

    `duplicates` are those of the manifest: tars of the partition may have lost photographs that an earlier one has too.
    """
    names = ", ".join(entry.name for entry in entries)
    (record,) = read_partition_records(shards, partition_index + 1, partition_index)
    if record is None:
        record_key = Partition(partition_index, (), ()).record_key
        return f"{names}: {record_key}, the record of what they were made from, is damaged or missing"
    partition, stored = record
    rebuilt = write_partition_tars(source, partition.names, partition_index, scratch, options)
    known_rejects = {reject.name for reject in stored.rejects}
    for reject in rebuilt.rejects:
        if reject.name not in known_rejects:
            return f"{names}: {source.uri} no longer gives {reject.name} ({reject.reason}); bring it back"
    if rebuilt.shards != stored.shards:
        return (
            f"{names}: the photographs in {source.uri} give other bytes than they did: bring back those that were "
            f"sharded, or rebuild the shards"
        )
    duplicate_of = {duplicate.name: duplicate.duplicate_of for duplicate in duplicates}
    rebuilt_entries = {entry.name: entry for entry in rebuilt.shards}
    for entry in entries:
        name = entry.name
        if name not in rebuilt_entries:  # a tar that was rewritten without the duplicates of other partitions
            original = rebuilt_entries[name.removesuffix("-unique.tar") + ".tar"]
            index = read_index(scratch, original.name)
            removed = {
                key: duplicate_of[photo]
                for photo, key in zip(index["names"], index["keys"], strict=True)
                if photo in duplicate_of
            }
            if rewrite_without(scratch, original, removed)[0].sha256 != entry.sha256:
                return f"{name}: rebuilt, it differs from the tar in the manifest: rebuild the shards"
        shards.write(index_name(name), scratch.read(index_name(name)))
        shards.upload(scratch.local_path(name) or Path(name), name)
    return ""
