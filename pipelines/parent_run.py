"""The MLflow run of `inpaint run` or `inpaint sweep`, parent of its steps' runs: parameters, dataset, scores, report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from data_prep.uris import redact_uri
from pipelines.contracts import EvaluateOutputs, ShardOutputs, StepKind, SweepOutputs
from pipelines.durable.mlflow_run import flatten_config
from pipelines.provenance import source_tags
from pipelines.tracking import runs
from pipelines.tracking.datasets import log_dataset
from pipelines.tracking.markdown import spaced_columns
from pipelines.tracking.pages import experiment_page

if TYPE_CHECKING:
    from data_prep.storage import Storage
    from pipelines.durable.workflow import RunResults
    from pipelines.recipe import Recipe
    from pipelines.tracking_address import Tracking

NOTE_TAG, MAX_TAG_CHARS = "mlflow.note.content", 8000  # the run's description in MLflow, in Markdown
REPORT_ARTIFACT = "report.html"


@dataclass(frozen=True)
class ParentRun:
    """The MLflow run of a recipe or of a sweep."""

    run_id: str
    experiment_id: str
    tracking: Tracking

    @property
    def address(self) -> str:
        """The page with the experiment's runs, or MLflow's URI if it has no pages."""
        return experiment_page(self.tracking.uri, self.experiment_id) or redact_uri(self.tracking.uri)


def open_parent_run(recipe: Recipe, tracking: Tracking, command: str) -> ParentRun:
    """Open the recipe's run, with the recipe's fields as parameters. `command`: for MLflow's `Source`.

    Raises TrackingError in one line if MLflow cannot be used.
    """
    tags = source_tags(f"inpaint {command} {recipe.name}") | {"inpaint.recipe": recipe.to_yaml()[:5000]}
    run_id = runs.open_run(tracking, recipe.digest, recipe.name, tags=tags)
    client = tracking.client()
    runs.log_params(client, run_id, recipe_params(recipe))
    return ParentRun(run_id, client.get_run(run_id).info.experiment_id, tracking)


def recipe_params(recipe: Recipe) -> dict[str, Any]:
    """The fields that enter the recipe's digest, `train.batch` and so on; unset ones are left out."""
    return {
        key: value for key, value in flatten_config(recipe.computed_fields()).items() if value is not None
    }


def log_results(parent: ParentRun, recipe: Recipe, storage: Storage, results: RunResults) -> None:
    """Log the dataset, and the final scores as far as there are any. May be repeated.

    The scores have the names that the versions' scores have; of several models, the model's key comes first. A sweep has
    the means of its best setting instead, as `best/METRIC`.
    """
    client, run = parent.tracking.client(), parent.run_id
    for shards in results.of_kind(StepKind.SHARD, ShardOutputs).values():
        log_dataset(client, run, storage.subfolder(shards.folder))
    for sweep in results.of_kind(StepKind.SWEEP, SweepOutputs).values():
        runs.log_metrics(client, run, {f"best/{metric}": value for metric, value in sweep.scores.items()})
        best = ", ".join(f"{path} {value}" for path, value in sweep.best_values.items())
        runs.log_tags(client, run, {"inpaint.best": best})
    for evaluated in results.of_kind(StepKind.EVALUATE, EvaluateOutputs).values():
        from pipelines.evaluation.results import EvaluationResult
        from pipelines.registry.step import metrics_by_band

        evaluation = EvaluationResult.load(storage.subfolder(evaluated.folder).read)
        for key in recipe.models:
            prefix = f"{key}/" if len(recipe.models) > 1 else ""
            scores = metrics_by_band(evaluation, key)
            runs.log_metrics(client, run, {f"{prefix}{name}": value for name, value in scores.items()})


def log_report(parent: ParentRun, html: str, summary: str) -> None:
    """Attach the report to the run, and describe the run by its summary, in Markdown."""
    client = parent.tracking.client()
    runs.log_text(client, parent.run_id, REPORT_ARTIFACT, html)
    runs.log_tags(client, parent.run_id, {NOTE_TAG: spaced_columns(summary)[:MAX_TAG_CHARS]})
