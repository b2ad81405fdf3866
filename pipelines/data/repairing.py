"""Repairs of shards: what a check found damaged is made again, and put in its place once it is known to be what it was."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray

from data_prep.checking import EDGES, Finding
from data_prep.preparing import ShardOptions
from data_prep.shards import without, write_slice
from data_prep.slices import Slice, read_slices
from data_prep.sources import Source, open_source
from data_prep.storage import Storage, open_storage
from data_prep.tars import index_name, read_index
from pipelines.data.fanout import make_edges, run_tasks
from pipelines.data.looking import Check

Progress = Callable[..., None]  # (done, total, note)


def repair(
    check: Check, findings: Sequence[Finding], progress: Progress, root: str | None = None
) -> list[str]:
    """Make the tars that `findings` name again, to the bytes that they had; why it could not be done, where it could not.

    A tar of photographs stays as it is unless the source still gives just what it was: one bad photograph is less of a
    loss than a shard. `root` is what a listing's names are relative to.
    """
    left = _photographs(
        check, {finding.shard for finding in findings if finding.sigma is None}, progress, root
    )
    for made in check.edges:
        names = {finding.shard for finding in findings if finding.sigma == made.sigma}
        for name in names - {EDGES}:
            made.folder.delete(index_name(name))  # without it the tar is not taken for finished
        if names:
            try:
                make_edges(check.shards, {made.sigma: made.folder}, progress)
            except ValueError as error:  # of a tar of photographs that is damaged still
                left.append(f"edges of sigma {made.sigma:g}: {getattr(error, 'cause', error)}")
    return left


def _photographs(check: Check, names: set[str], progress: Progress, root: str | None) -> list[str]:
    """Each slice that has damaged tars, a task; why some stay as they are."""
    options = ShardOptions.of(check.manifest["options"])
    source = open_source(check.manifest["source"], options.size, root)
    damaged: dict[int, list[dict[str, Any]]] = {}
    for entry in check.manifest["shards"]:
        if entry["name"] in names:
            damaged.setdefault(entry["slice"], []).append(entry)
    if not damaged:
        return []
    shared = (check.shards, source, options, check.manifest["duplicates"])
    sizes = [sum(entry["count"] for entry in entries) for entries in damaged.values()]
    told = sorted(run_tasks(_remake, shared, list(damaged.items()), sizes, progress, "photographs"))
    return [reason for _, reason in told if reason]


@ray.remote(num_cpus=1)
def _remake(
    shared: tuple[Storage, Source, ShardOptions, Sequence[Mapping[str, str]]],
    slice_of: tuple[int, Sequence[Mapping[str, Any]]],
) -> str:
    with tempfile.TemporaryDirectory(prefix="inpaint-repair-") as folder:
        return remake_tars(*shared, *slice_of, open_storage(folder))


def remake_tars(
    shards: Storage,
    source: Source,
    options: ShardOptions,
    duplicates: Sequence[Mapping[str, str]],
    number: int,
    entries: Sequence[Mapping[str, Any]],
    scratch: Storage,
) -> str:
    """Make the tars `entries` of slice `number` again, in `scratch` (a folder) first; why they stay as they are, or "".

    `duplicates` are the manifest's: an earlier slice may have taken photographs from the tar that the slice made.
    """
    told = ", ".join(entry["name"] for entry in entries)
    (record,) = read_slices(shards, number + 1, number)
    if record is None:
        return f"{told}: {Slice(number, (), ()).record}, which says what they were made from, is damaged or missing"
    piece, part = record
    made = write_slice(source, piece.names, number, scratch, options)
    known = {reject["name"] for reject in part["rejects"]}
    for reject in made["rejects"]:
        if reject["name"] not in known:
            return (
                f"{told}: {source.uri} no longer gives {reject['name']} ({reject['reason']}); bring it back"
            )
    if made["shards"] != part["shards"]:
        return (
            f"{told}: the photographs in {source.uri} give other bytes than they did: bring back those that were "
            f"sharded, or make the shards anew"
        )
    taken = {again["name"]: again["same_as"] for again in duplicates}
    whole = {entry["name"]: entry for entry in made["shards"]}
    for entry in entries:
        name = entry["name"]
        if name not in whole:  # what the whole set's duplicates left of a tar
            first = whole[name.removesuffix("-unique.tar") + ".tar"]
            index = read_index(scratch, first["name"])
            again = {
                key: taken[n] for n, key in zip(index["names"], index["keys"], strict=True) if n in taken
            }
            if without(scratch, first, again)[0]["sha256"] != entry["sha256"]:
                return f"{name}: made again it is another tar than the manifest names: make the shards anew"
        shards.write(index_name(name), scratch.read(index_name(name)))
        shards.upload(scratch.path(name) or Path(name), name)
    return ""
