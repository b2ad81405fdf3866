"""The step that evaluates."""

from __future__ import annotations

from mlflow import MlflowClient

from pipelines import tracking
from pipelines.durable.steps import StepContext
from pipelines.durable.tracked import Value, tracked
from pipelines.evaluation.completers import photographs
from pipelines.evaluation.evaluate import EvaluationSpec, baselines
from pipelines.evaluation.evaluate import evaluate as score
from pipelines.evaluation.figures import encode_png, sample_grid
from pipelines.evaluation.score_tasks import Methods, OverTasks, StoredModel, opened
from pipelines.evaluation.tables import table_markdown


@tracked
def evaluate(ctx: StepContext, client: MlflowClient | None, run: str) -> Value:
    """Every trained model and the classical baselines on the held-out photographs, under one protocol.

    Where there is enough to score, a slice of photographs a Ray task.
    """
    shards = ctx.storage.sub(ctx.inputs["shard"]["shards"])
    photos = photographs(shards, ctx.config["split"])
    trained = {
        name.removeprefix("train-"): StoredModel(ctx.storage, value["weights"])
        for name, value in ctx.inputs.items()
        if "weights" in value
    }
    methods: Methods = (*baselines().items(), *trained.items())
    spec = EvaluationSpec.of(ctx.config)
    found = score(opened(methods), photos, spec, progress=ctx.progress, over=OverTasks(methods))
    keys = found.save(ctx.storage.sub(ctx.work).write)
    if client:
        for method in found.methods:
            tracking.log_values(client, run, {f"{method}/{k}": v for k, v in found.flat(method).items()})
        tracking.log_text(client, run, "table.md", table_markdown(found))
        for grid in found.grids():
            tracking.log_picture(client, run, f"samples/{grid.title}.png", encode_png(sample_grid(grid)))
    return {
        "outputs": [f"{ctx.work}/{key}" for key in keys],
        "evaluation": ctx.work,
        "scores": {method: found.score(method, ctx.config["metric"]) for method in trained},
    }
