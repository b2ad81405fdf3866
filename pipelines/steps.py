"""The steps that make data: fan out over Ray, keep the outputs in the step's folder, tell MLflow.

Apart from model_steps.py because they need no torch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from data_prep.shards import ShardOptions
from pipelines import tracking
from pipelines.durable import StepContext
from pipelines.fanout import make_edges, shard_photographs
from pipelines.tracking import Tracking

if TYPE_CHECKING:
    from mlflow import MlflowClient

Value = dict[str, Any]
StepFunction = Callable[[StepContext], Value]


def tracked(function: Callable[[StepContext, MlflowClient | None, str], Value]) -> StepFunction:
    """Gives a step its MLflow run, a child of the recipe's: found again after a crash, ended as the step ends.

    A step of a trial (local["run"]) writes in the trial's run, which is not its to end.
    """

    @functools.wraps(function)
    def step(ctx: StepContext) -> Value:
        where = ctx.local.get("tracking")
        if not where:
            return function(ctx, None, "")
        place = Tracking(**where)
        if shared := ctx.local.get("run"):
            return function(ctx, place.client(), shared)
        run = tracking.open_run(place, ctx.key, ctx.name, parent=ctx.local.get("parent"))
        with tracking.running(place, run) as client:
            tracking.log_params(client, run, flatten(ctx.config))
            return function(ctx, client, run)

    return step


@tracked
def shard(ctx: StepContext, client: MlflowClient | None, run: str) -> Value:
    """Photographs -> tars, a slice of the listing a Ray task."""
    config = ctx.config
    names = ("size", "margin", "crop", "format", "quality", "val", "test")
    options = ShardOptions(**{name: config[name] for name in names})
    out = ctx.storage.sub(ctx.work)
    manifest = shard_photographs(
        config["source"], out, options, config["shard_photos"], ctx.progress, config["max_rejects"]
    )
    if client:
        counts = {f"photographs/{split}": n for split, n in manifest["splits"].items()}
        tracking.log_values(client, run, counts | {"photographs/rejected": len(manifest["rejects"])})
        tracking.log_dataset(client, run, config["source"], manifest)
    return {
        "outputs": [f"{ctx.work}/{key}" for key, _ in out.list()],
        "shards": ctx.work,
        "digest": manifest["digest"],
        "splits": manifest["splits"],
        "rejects": len(manifest["rejects"]),
    }


@tracked
def edges(ctx: StepContext, client: MlflowClient | None, run: str) -> Value:
    """Tars -> edge side tars of one sigma, a tar a Ray task."""
    out, sigma = ctx.storage.sub(ctx.work), ctx.config["sigma"]
    manifest = make_edges(ctx.storage.sub(ctx.inputs["shard"]["shards"]), sigma, out, ctx.progress)
    if client:
        tracking.log_values(client, run, {"bytes": sum(entry["bytes"] for entry in manifest["shards"])})
    return {"outputs": [f"{ctx.work}/{key}" for key, _ in out.list()], "edges": ctx.work, "sigma": sigma}


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}, as the recipe names its fields."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
