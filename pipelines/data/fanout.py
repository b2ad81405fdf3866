"""Slices of the data's work given to Ray tasks: what data_prep does for one slice, done for all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ray

from data_prep.canny import assemble_edges, write_edge_shard
from data_prep.checking import Finding
from data_prep.preparing import ShardOptions, sample_decoder
from data_prep.shards import assemble, load_manifest, make_slice, plan
from data_prep.sources import Source, open_source
from data_prep.storage import Storage
from pipelines.data.looking import Check, repeated

Progress = Callable[..., None]  # (done, total, note)


class TooManyRejects(ValueError):
    """More of the photographs are unusable than the recipe accepts."""


def shard_photographs(
    uri: str,
    out: Storage,
    options: ShardOptions,
    length: int,
    progress: Progress,
    max_rejects: float = 1.0,
    root: str | None = None,
) -> dict[str, Any]:
    """Photographs -> tars in `out`, `length` photographs of the listing a task; returns the manifest.

    What is finished in `out` already is kept, and photographs that are new there make new tars. Raises TooManyRejects
    as soon as more than the share `max_rejects` of the files is unusable.
    """
    source = open_source(uri, options.size, root)
    out.tidy()
    slices, parts = plan(source, out, options, length)
    total = sum(len(piece.names) for piece in slices)
    todo = [piece for piece in slices if piece.number not in parts]
    sizes = [len(piece.names) for piece in todo]
    rejected = sum(len(part["rejects"]) for part in parts.values())
    _check_rejects(rejected, parts, max_rejects, total, source)
    for number, part in run_tasks(
        _make_slice, (source, out, options), todo, sizes, progress, "photographs", total
    ):
        parts[todo[number].number] = part
        rejected += len(part["rejects"])
        _check_rejects(rejected, parts, max_rejects, total, source)
    return assemble([parts[piece.number] for piece in slices], options, source.uri, out)


def _check_rejects(
    count: int, parts: Mapping[int, Mapping[str, Any]], share: float, total: int, source: Source
) -> None:
    if count > share * total:
        rejects = [reject for number in sorted(parts) for reject in parts[number]["rejects"]]
        first = "; ".join(f"{reject['name']}: {reject['reason']}" for reject in rejects[:3])
        raise TooManyRejects(
            f"{count} of {total} files in {source.uri} are unusable, more than data.max_rejects = "
            f"{share:g} allows ({first}); remove them or raise the limit"
        )


def make_edges(shards: Storage, outs: Mapping[float, Storage], progress: Progress) -> None:
    """Tars -> edge side tars of each sigma in that sigma's storage, a tar of photographs a task; then edges.json."""
    manifest = load_manifest(shards)
    entries = manifest["shards"]
    shared = (shards, dict(outs), manifest["options"])
    sizes = [entry["count"] for entry in entries]
    made = dict(run_tasks(_write_edges, shared, entries, sizes, progress, "edge maps"))
    for sigma, out in outs.items():
        assemble_edges([made[n][sigma] for n in range(len(entries))], sigma, manifest["digest"], out)


def check_shards(check: Check, progress: Progress) -> list[Finding]:
    """What is wrong with a folder of shards, a tar a task; in the manifest's order."""
    entries = check.manifest["shards"]
    sizes = [entry["count"] for entry in entries]
    found = dict(run_tasks(_check_tar, check, entries, sizes, progress, "photographs"))
    findings = [finding for number in range(len(entries)) for finding in found[number][0]]
    return findings + repeated([(entry["name"], found[n][1]) for n, entry in enumerate(entries)])


@ray.remote(num_cpus=1)
def _check_tar(check: Check, entry: dict[str, Any]) -> tuple[list[Finding], list[str]]:
    return check.tar(entry)


@ray.remote(num_cpus=1)
def _make_slice(shared: tuple[Source, Storage, ShardOptions], piece: Any) -> dict[str, Any]:
    source, out, options = shared
    return make_slice(source, piece, out, options)


@ray.remote(num_cpus=1)
def _write_edges(
    shared: tuple[Storage, dict[float, Storage], dict], entry: dict[str, Any]
) -> dict[float, Any]:
    shards, outs, options = shared
    return write_edge_shard(shards, entry, outs, sample_decoder({"options": options}))


def run_tasks(
    task: Any,
    shared: Any,
    items: Sequence[Any],
    sizes: Sequence[int],
    progress: Progress,
    unit: str,
    total: int | None = None,
) -> Iterator[tuple[int, Any]]:
    """(number, result) of `task`(shared, item), a remote function, for each item as it is done; a few more are started
    than the cluster has CPUs. `sizes` are the items' photographs, `total` (None: their sum) counts those that were done
    before; progress has the rate.

    The first failure cancels the rest.
    """
    total = sum(sizes) if total is None else total
    done, handed = total - sum(sizes), ray.put(shared)
    base, began = done, time.monotonic()
    progress(done, total, unit)
    waiting: dict[ray.ObjectRef, int] = {}
    coming = iter(range(len(items)))
    try:
        while True:
            ahead = 2 + int(2 * ray.cluster_resources().get("CPU", 1))  # asked anew: a cluster grows
            while len(waiting) < ahead and (number := next(coming, None)) is not None:
                waiting[task.remote(handed, items[number])] = number
            if not waiting:
                return
            (ready, *_), _ = ray.wait(list(waiting))
            number = waiting.pop(ready)
            result = ray.get(ready)
            done += sizes[number]
            progress(done, total, f"{unit}, {(done - base) / (time.monotonic() - began):.0f}/s")
            yield number, result
    finally:
        for job in waiting:
            ray.cancel(job)
