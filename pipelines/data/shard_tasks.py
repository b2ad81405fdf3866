"""Runs data_prep's sharding and edge maps as Ray tasks, one per partition or tar."""

from __future__ import annotations

from collections.abc import Mapping

import ray

from data_prep.edge_maps import EdgeTarEntry, write_edge_manifest, write_edge_tars
from data_prep.left_out import LeftOut, printable
from data_prep.manifest import Manifest, PartitionResult, ShardEntry, load_manifest
from data_prep.partitions import Partition
from data_prep.preprocess import ShardOptions, make_sample_decoder
from data_prep.shards import merge_partitions, plan_shards, write_partition
from data_prep.sources import PhotoSource, open_source
from data_prep.storage import Storage
from pipelines.ray_tasks import ProgressCallback, run_tasks


class TooManyRejects(ValueError):
    """More photographs are unusable than the recipe allows."""


def shard_photographs(
    uri: str,
    out: Storage,
    options: ShardOptions,
    partition_size: int,
    progress: ProgressCallback,
    max_reject_fraction: float = 1.0,
    root: str | None = None,
) -> Manifest:
    """Photographs -> tars in `out`, one Ray task per `partition_size` photographs; returns the manifest.

    Finished partitions in `out` are kept; new photographs get new tars. Raises TooManyRejects as soon as more than
    `max_reject_fraction` of the files are unusable.
    """
    source = open_source(uri, options.size, root)
    out.remove_temporary_files()
    left_out = LeftOut()
    partitions, results = plan_shards(source, out, options, partition_size, left_out)
    total = sum(len(partition.names) for partition in partitions)
    pending = [partition for partition in partitions if partition.index not in results]
    sizes = [len(partition.names) for partition in pending]
    rejected = sum(len(result.rejects) for result in results.values())
    _check_rejects(rejected, results, max_reject_fraction, total, source)
    for number, result in run_tasks(
        _write_partition, (source, out, options), pending, sizes, progress, "photographs", total
    ):
        results[pending[number].index] = result
        rejected += len(result.rejects)
        _check_rejects(rejected, results, max_reject_fraction, total, source)
    ordered = [results[partition.index] for partition in partitions]
    return merge_partitions(ordered, options, source.uri, out, left_out)


def _check_rejects(
    count: int, results: Mapping[int, PartitionResult], max_fraction: float, total: int, source: PhotoSource
) -> None:
    if count > max_fraction * total:
        rejects = [reject for index in sorted(results) for reject in results[index].rejects]
        first = printable("; ".join(f"{reject.name}: {reject.reason}" for reject in rejects[:3]))
        raise TooManyRejects(
            f"{count} of {total} files in {source.uri} are unusable, more than data.max_reject_fraction = "
            f"{max_fraction:g} allows ({first}); remove them or raise the limit"
        )


def make_edge_tars(shards: Storage, outputs: Mapping[float, Storage], progress: ProgressCallback) -> None:
    """Write the edge tars of each sigma into outputs[sigma], one Ray task per photograph tar, then edges.json."""
    manifest = load_manifest(shards)
    entries = manifest.shards
    shared = (shards, dict(outputs), manifest.options)
    sizes = [entry.count for entry in entries]
    results = dict(run_tasks(_write_edge_tars, shared, entries, sizes, progress, "edge maps"))
    for sigma, out in outputs.items():
        edge_entries = [results[n][sigma] for n in range(len(entries))]
        write_edge_manifest(edge_entries, sigma, manifest.digest, out)


@ray.remote(num_cpus=1)
def _write_partition(
    shared: tuple[PhotoSource, Storage, ShardOptions], partition: Partition
) -> PartitionResult:
    source, out, options = shared
    return write_partition(source, partition, out, options)


@ray.remote(num_cpus=1)
def _write_edge_tars(
    shared: tuple[Storage, dict[float, Storage], ShardOptions], entry: ShardEntry
) -> dict[float, EdgeTarEntry]:
    shards, outputs, options = shared
    return write_edge_tars(shards, entry, outputs, make_sample_decoder(options))
