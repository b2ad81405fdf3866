"""The steps that make data: fan out over Ray, keep the outputs in the step's folder, tell MLflow."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from data_prep.canny import load_edges
from data_prep.preparing import ShardOptions
from data_prep.shards import load_manifest
from data_prep.slices import READERS
from data_prep.storage import MissingKey
from data_prep.tars import index_name
from pipelines import tracking
from pipelines.data.fanout import make_edges, shard_photographs
from pipelines.durable.steps import StepContext, canonical
from pipelines.durable.tracked import Value, tracked

if TYPE_CHECKING:
    from mlflow import MlflowClient


@tracked
def shard(ctx: StepContext, client: MlflowClient | None, run: str) -> Value:
    """Photographs -> tars, a slice of the listing a Ray task.

    They lie in `stable`: an attempt goes on where the one before it was interrupted. Where shards of the same settings
    were made from an earlier state of the source, theirs are taken over, and only what is new is made.
    """
    config, out = ctx.config, ctx.storage.sub(ctx.stable)
    options = ShardOptions.of(config)
    family = {name: value for name, value in config.items() if name != "listing"}
    take_over(ctx, family, lambda key: True)
    manifest = shard_photographs(
        config["source"],
        out,
        options,
        config["shard_photos"],
        ctx.progress,
        config["max_rejects"],
        config["root"],
    )
    remember(ctx, family)
    if client:
        counts = {f"photographs/{split}": n for split, n in manifest["splits"].items()}
        counts["photographs/rejected"] = len(manifest["rejects"])
        tracking.log_values(client, run, counts | {"photographs/duplicate": len(manifest["duplicates"])})
        tracking.log_dataset(client, run, config["source"], manifest)
    return {
        "outputs": [f"{ctx.stable}/{key}" for key, _ in out.list()],
        "shards": ctx.stable,
        "digest": manifest["digest"],
        "splits": manifest["splits"],
        "rejects": len(manifest["rejects"]),
    }


@tracked
def edges(ctx: StepContext, client: MlflowClient | None, run: str) -> Value:
    """Tars -> edge side tars of one sigma, a tar a Ray task; kept and taken over as the photographs' tars are."""
    out, sigma = ctx.storage.sub(ctx.stable), ctx.config["sigma"]
    shards = ctx.storage.sub(ctx.inputs["shard"]["shards"])
    photos = load_manifest(shards)
    family = {"sigma": sigma, "source": photos["source"], "options": photos["options"]}
    files = {file for entry in photos["shards"] for file in (entry["name"], index_name(entry["name"]))}
    take_over(ctx, family, files.__contains__)
    make_edges(shards, {sigma: out}, ctx.progress)
    remember(ctx, family)
    if client:
        entries = load_edges(out, photos["digest"])["shards"]
        tracking.log_values(client, run, {"bytes": sum(entry["bytes"] for entry in entries)})
    return {
        "outputs": [f"{ctx.stable}/{key}" for key, _ in out.list() if key in files or key == "edges.json"],
        "edges": ctx.stable,
        "sigma": sigma,
    }


def take_over(ctx: StepContext, family: Mapping[str, Any], wanted: Callable[[str], bool]) -> None:
    """Copy into `stable` what the last step of this family left, unless this one has begun for itself.

    Folders link, buckets copy on the server; the manifest comes last.
    """
    try:
        folder = json.loads(ctx.storage.read(_latest(family)))["folder"]
    except MissingKey:
        return
    old, last = ctx.storage.sub(folder), "manifest.json"
    if folder == ctx.stable or ctx.storage.exists(f"{ctx.stable}/{last}"):
        return
    found = [key for key, _ in old.list() if wanted(key)]
    with ThreadPoolExecutor(READERS) as pool:
        rest = [key for key in found if key != last]
        list(pool.map(lambda key: ctx.storage.copy(f"{folder}/{key}", f"{ctx.stable}/{key}"), rest))
    if last in found:
        ctx.storage.copy(f"{folder}/{last}", f"{ctx.stable}/{last}")


def remember(ctx: StepContext, family: Mapping[str, Any]) -> None:
    """That this step is the last of its family."""
    ctx.storage.write(_latest(family), json.dumps({"folder": ctx.stable}).encode())


def _latest(family: Mapping[str, Any]) -> str:
    return f"latest/{hashlib.sha256(canonical(family).encode()).hexdigest()[:16]}.json"
