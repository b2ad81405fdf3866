"""Slices of the data's work given to Ray tasks: what data_prep does for one slice, done for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray

from data_prep.canny import assemble_edges, write_edge_shard
from data_prep.shards import ShardOptions, assemble, load_manifest, write_slice
from data_prep.sources import Source, open_source
from data_prep.storage import Storage

Progress = Callable[..., None]  # (done, total, note)


class TooManyRejects(ValueError):
    """More of the photographs are unusable than the recipe accepts."""


def shard_photographs(
    uri: str, out: Storage, options: ShardOptions, length: int, progress: Progress, max_rejects: float = 1.0
) -> dict[str, Any]:
    """Photographs -> tars in `out`, `length` photographs of the listing a task; returns the manifest.

    Raises TooManyRejects when more than the share `max_rejects` of the files is unusable.
    """
    source = open_source(uri, tile=options.size)
    listing = source.names()
    slices = [listing[start : start + length] for start in range(0, len(listing), length)]
    jobs = [_write_slice.remote(source, part, index, out, options) for index, part in enumerate(slices)]
    parts = _collect(jobs, [len(part) for part in slices], progress, "photographs")
    manifest = assemble(parts, options, source.uri, out)
    rejects = manifest["rejects"]
    if len(rejects) > max_rejects * len(listing):
        first = "; ".join(f"{reject['name']}: {reject['reason']}" for reject in rejects[:3])
        raise TooManyRejects(
            f"{len(rejects)} of {len(listing)} files in {source.uri} are unusable, more than data.max_rejects = "
            f"{max_rejects:g} allows ({first}); remove them or raise the limit"
        )
    return manifest


def make_edges(shards: Storage, sigma: float, out: Storage, progress: Progress) -> dict[str, Any]:
    """Tars -> edge side tars of one sigma in `out`, a tar a task; returns edges.json."""
    manifest = load_manifest(shards)
    jobs = [_write_edges.remote(shards, entry, sigma, out) for entry in manifest["shards"]]
    parts = _collect(jobs, [entry["count"] for entry in manifest["shards"]], progress, "edge maps")
    return assemble_edges(parts, sigma, manifest["digest"], out)


@ray.remote(num_cpus=1)
def _write_slice(
    source: Source, names: list[str], index: int, out: Storage, options: ShardOptions
) -> dict[str, Any]:
    return write_slice(source, names, index, out, options)


@ray.remote(num_cpus=1)
def _write_edges(shards: Storage, entry: dict[str, Any], sigma: float, out: Storage) -> dict[str, Any]:
    return write_edge_shard(shards, entry, sigma, out)


def _collect(
    jobs: list[ray.ObjectRef], sizes: list[int], progress: Progress, unit: str
) -> list[dict[str, Any]]:
    """The results in the jobs' order; progress as they come in. The first failure cancels the rest."""
    size, done, waiting = dict(zip(jobs, sizes, strict=True)), 0, list(jobs)
    progress(0, sum(sizes), unit)
    try:
        while waiting:
            ready, waiting = ray.wait(waiting)
            ray.get(ready)
            done += sum(size[job] for job in ready)
            progress(done, sum(sizes), unit)
    except BaseException:
        for job in waiting:
            ray.cancel(job)
        raise
    return ray.get(jobs)
