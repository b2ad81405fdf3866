"""The steps `shard` and `edges`: they fan out over Ray, keep the outputs in the step's folder, and log to MLflow."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from data_prep.edge_maps import EDGE_MANIFEST, load_edge_manifest
from data_prep.left_out import left_out_total
from data_prep.manifest import MANIFEST, load_manifest
from data_prep.partitions import IO_THREADS
from data_prep.preprocess import ShardOptions
from data_prep.records import to_json
from data_prep.storage import MissingKey
from data_prep.tars import index_name
from pipelines.contracts import (
    EdgesConfig,
    EdgesInputs,
    EdgesOutputs,
    RunSettings,
    ShardConfig,
    ShardOutputs,
)
from pipelines.data.shard_tasks import make_edge_tars, shard_photographs
from pipelines.durable.mlflow_run import with_mlflow_run
from pipelines.durable.steps import NoInputs, StepContext, canonical_json
from pipelines.tracking import runs
from pipelines.tracking.datasets import log_dataset

if TYPE_CHECKING:
    from mlflow import MlflowClient


@with_mlflow_run
def shard(
    ctx: StepContext[ShardConfig, NoInputs, RunSettings], client: MlflowClient | None, run_id: str
) -> ShardOutputs:
    """Photographs -> tars, one Ray task per partition of the source listing.

    The tars are in the persistent folder, so an interrupted attempt is resumed. If shards with the same settings were
    made from an earlier state of the source, they are reused and only new photographs are sharded.
    """
    config, out = ctx.config, ctx.storage.subfolder(ctx.persistent_folder)
    values = to_json(config)
    settings = {name: value for name, value in values.items() if name != "listing_digest"}
    reuse_previous_output(ctx, settings, lambda key: True)
    manifest = shard_photographs(
        config.source,
        out,
        ShardOptions.from_mapping(values),
        config.partition_size,
        ctx.progress,
        config.max_reject_fraction,
        config.root,
    )
    mark_as_latest(ctx, settings)
    if client:
        metrics = {f"photographs/{split}": n for split, n in manifest.splits.items()}
        metrics["photographs/rejected"] = len(manifest.rejects)
        metrics["photographs/left_out"] = left_out_total(manifest.left_out or {})
        metrics["photographs/duplicate"] = len(manifest.duplicates)
        runs.log_metrics(client, run_id, metrics)
        log_dataset(client, run_id, out)
    return ShardOutputs(
        files=tuple(f"{ctx.persistent_folder}/{key}" for key, _ in out.list()),
        folder=ctx.persistent_folder,
        digest=manifest.digest,
        splits=dict(manifest.splits),
        rejects=len(manifest.rejects),
    )


@with_mlflow_run
def edges(
    ctx: StepContext[EdgesConfig, EdgesInputs, RunSettings], client: MlflowClient | None, run_id: str
) -> EdgesOutputs:
    """Tars -> edge tars for one sigma, one Ray task per tar. Reuses finished tars as `shard` does."""
    out, sigma = ctx.storage.subfolder(ctx.persistent_folder), ctx.config.sigma
    shards = ctx.storage.subfolder(ctx.inputs.shards.folder)
    photos = load_manifest(shards)
    settings = {"sigma": sigma, "source": photos.source, "options": asdict(photos.options)}
    files = {file for entry in photos.shards for file in (entry.name, index_name(entry.name))}
    reuse_previous_output(ctx, settings, files.__contains__)
    make_edge_tars(shards, {sigma: out}, ctx.progress)
    mark_as_latest(ctx, settings)
    if client:
        entries = load_edge_manifest(out, photos.digest).shards
        runs.log_metrics(client, run_id, {"bytes": sum(entry.bytes for entry in entries)})
    return EdgesOutputs(
        files=tuple(
            f"{ctx.persistent_folder}/{key}" for key, _ in out.list() if key in files or key == EDGE_MANIFEST
        ),
        folder=ctx.persistent_folder,
        sigma=sigma,
        digest=hashlib.sha256(out.read(EDGE_MANIFEST)).hexdigest(),
    )


def reuse_previous_output(
    ctx: StepContext[Any, Any, Any], settings: Mapping[str, Any], include: Callable[[str], bool]
) -> None:
    """Seed the persistent folder with the output of the last step that had the same settings, unless it has a manifest
    already or is that output itself.

    Local files are hard-linked, S3 objects copied on the server; the manifest comes last.
    """
    try:
        folder = json.loads(ctx.storage.read(_latest_key(settings)))["folder"]
    except MissingKey:
        return
    if folder == ctx.persistent_folder or ctx.storage.exists(f"{ctx.persistent_folder}/{MANIFEST}"):
        return

    def copy(key: str) -> None:
        ctx.storage.copy(f"{folder}/{key}", f"{ctx.persistent_folder}/{key}")

    keys = [key for key, _ in ctx.storage.subfolder(folder).list() if include(key)]
    with ThreadPoolExecutor(IO_THREADS) as pool:
        list(pool.map(copy, [key for key in keys if key != MANIFEST]))
    if MANIFEST in keys:
        copy(MANIFEST)


def mark_as_latest(ctx: StepContext[Any, Any, Any], settings: Mapping[str, Any]) -> None:
    """Record that this step is the last one with these settings."""
    ctx.storage.write(_latest_key(settings), json.dumps({"folder": ctx.persistent_folder}).encode())


def _latest_key(settings: Mapping[str, Any]) -> str:
    return f"latest/{hashlib.sha256(canonical_json(settings).encode()).hexdigest()[:16]}.json"
