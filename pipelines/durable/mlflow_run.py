"""A step's MLflow run: started with the step, resumed after a crash, ended with the step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from data_prep.records import to_json
from pipelines.contracts import RunSettings
from pipelines.durable.steps import StepContext
from pipelines.tracking import runs

if TYPE_CHECKING:
    from mlflow import MlflowClient

Config = TypeVar("Config")
Inputs = TypeVar("Inputs")
Outputs = TypeVar("Outputs")


def with_mlflow_run(
    function: Callable[[StepContext[Config, Inputs, RunSettings], MlflowClient | None, str], Outputs],
) -> Callable[[StepContext[Config, Inputs, RunSettings]], Outputs]:
    """Decorate a step function that takes (context, client, run id) so that it gets an MLflow run of its own.

    The run is a child of the recipe's run. It is resumed after a crash and ended with the step. A step of a trial
    (settings.trial_run_id) logs to the trial's run and does not end it. Without MLflow the client is None, the id "".
    """

    @functools.wraps(function)
    def step(ctx: StepContext[Config, Inputs, RunSettings]) -> Outputs:
        tracking = ctx.settings.tracking
        if tracking is None:
            return function(ctx, None, "")
        if trial_run_id := ctx.settings.trial_run_id:
            return function(ctx, tracking.client(), trial_run_id)
        run_id = runs.open_run(tracking, ctx.key, ctx.name, parent_run_id=ctx.settings.parent_run_id)
        with runs.finish_run_on_exit(tracking, run_id) as client:
            runs.log_params(client, run_id, flatten_config(to_json(ctx.config)))
            return function(ctx, client, run_id)

    return step


def flatten_config(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}, the recipe's notation for fields."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten_config(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
