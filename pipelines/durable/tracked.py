"""A step's MLflow run: opened as it begins, found again after a crash, ended as it ends."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from pipelines import tracking
from pipelines.durable.steps import StepContext
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


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}, as the recipe names its fields."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
