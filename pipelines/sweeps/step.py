"""The step `sweep`: run the trials, then write the result, the report and the best recipe."""

from __future__ import annotations

import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, cast

from data_prep.storage import Storage
from data_prep.uris import path_from_sqlite_url, quote_for_shell
from pipelines.contracts import RunSettings, SweepConfig, SweepInputs, SweepOutputs
from pipelines.durable.mlflow_run import with_mlflow_run
from pipelines.durable.steps import StepContext
from pipelines.durable.task import ProgressReporter
from pipelines.evaluation.results import EvaluationResult
from pipelines.provenance import code_version
from pipelines.recipe import Recipe
from pipelines.recipe.load import parse_recipe
from pipelines.report_files import format_date
from pipelines.sweeps.results import SweepResult, best_recipe_file, format_values
from pipelines.sweeps.space import (
    best_recipe,
    iter_settings,
    sweep_section,
    swept_model,
    total_steps,
    trial_recipe,
)
from pipelines.sweeps.trial import SweepContext
from pipelines.sweeps.trial_store import TrialStore, trial_store_folder
from pipelines.sweeps.tuner import TUNE_FOLDER, TrialCallback, tune_trials
from pipelines.tracking import runs
from pipelines.tracking.pages import run_page
from pipelines.training.ray_filesystem import ray_storage_location

if TYPE_CHECKING:
    from mlflow import MlflowClient


RESULT_FILE, REPORT_FILE = "sweep.json", "sweep.html"
SweepStepContext = StepContext[SweepConfig, SweepInputs, RunSettings]


@with_mlflow_run
def sweep(
    ctx: StepContext[SweepConfig, SweepInputs, RunSettings], client: MlflowClient | None, run_id: str
) -> SweepOutputs:
    """Run the trials, as many concurrently as fit on the cluster.

    The trial store lies in the persistent folder: the next attempt of this step resumes from it.
    """
    recipe = parse_recipe({**ctx.config.recipe, "scaling": ctx.settings.scaling.model_dump()})
    baselines = ctx.inputs.baselines
    for metric in sweep_section(recipe).metrics:
        if not any(metric in scores for scores in baselines.scores.values()):
            raise ValueError(f"sweep.metrics: {metric} is not available: {baselines.no_distance_reason}")
    context = _sweep_context(ctx, recipe, run_id)
    store = TrialStore(ctx.storage, context.store_folder, context.total_steps - context.start_step)
    callback = TrialCallback(store, context, _expected_trials(recipe), client)
    callback.report_progress()
    path, filesystem = ray_storage_location(ctx.storage, ctx.attempt_folder)
    tune_trials(context, store, callback, ctx.settings.max_concurrent_trials, path, filesystem)
    ctx.storage.delete_tree(f"{ctx.attempt_folder}/{TUNE_FOLDER}")
    callback.end_mlflow_runs()
    callback.end_replaced_runs()
    result = _sweep_result(ctx, recipe, store, context, client, run_id)
    output = ctx.storage.subfolder(ctx.attempt_folder)
    output.write(RESULT_FILE, result.to_json().encode())
    names = [RESULT_FILE, *_write_report(ctx, recipe, result, output)]
    best = result.best_group
    if client:
        for name in names:
            _log_artifact(client, run_id, output, name)
        runs.log_tags(client, run_id, {"inpaint.best": format_values(best.values) if best else "none"})
        if best:
            runs.log_metrics(client, run_id, {f"best/{m}": best.mean(m) for m in result.metrics})
    if best is None:
        raise ValueError(f"no trial of the sweep finished: {_failure_reasons(result)}")
    return SweepOutputs(
        files=tuple(f"{ctx.attempt_folder}/{name}" for name in names),
        result=f"{ctx.attempt_folder}/{RESULT_FILE}",
        report=f"{ctx.attempt_folder}/{REPORT_FILE}",
        best_recipe=f"{ctx.attempt_folder}/{best_recipe_file(result.name)}",
        best_values=best.values,
        scores={metric: best.mean(metric) for metric in result.metrics},
        run_id=run_id,
    )


def _sweep_context(ctx: SweepStepContext, recipe: Recipe, run_id: str) -> SweepContext:
    first = next(iter_settings(recipe), {})
    return SweepContext(
        step_key=ctx.key,
        recipe=recipe,
        storage=ctx.storage,
        input_manifests=ctx.input_manifests,
        store_folder=trial_store_folder(ctx.key),
        step_settings=RunSettings(
            tracking=ctx.settings.tracking if run_id else None,
            parent_run_id=run_id or None,
            recipe_yaml=ctx.settings.recipe_yaml,
            scaling=ctx.settings.scaling,
        ),
        start_step=ctx.config.shared_steps,
        total_steps=total_steps(trial_recipe(recipe, first)),
        progress=cast(ProgressReporter, ctx.progress),
    )


def _expected_trials(recipe: Recipe) -> int:
    """The expected number of trials, for the progress display; 0 if unknown."""
    sweep = sweep_section(recipe)
    grid_size = sum(1 for _ in iter_settings(recipe)) if sweep.search == "grid" else None
    limits = [limit for limit in (grid_size, sweep.budget.trials) if limit is not None]
    return min(limits) if limits else 0


def _sweep_result(
    ctx: SweepStepContext,
    recipe: Recipe,
    store: TrialStore,
    context: SweepContext,
    client: MlflowClient | None,
    run_id: str,
) -> SweepResult:
    sweep, code = sweep_section(recipe), code_version()
    baselines, shards = ctx.inputs.baselines, ctx.inputs.shards
    scored = EvaluationResult.load(ctx.storage.subfolder(baselines.folder).read)
    splits = ", ".join(f"{count} {split}" for split, count in shards.splits.items())
    about = {
        "date": format_date(datetime.now(UTC)),
        "source": recipe.data.source,
        "photographs": splits + (f"; {shards.rejects} rejected" if shards.rejects else ""),
        "storage": ctx.storage.uri,
        "MLflow": _mlflow_page(ctx, client, run_id),
        "search": sweep.search,
        "scheduler": sweep.scheduler,
        "minutes": f"{store.total_seconds / 60:.0f}",
        "steps": str(context.total_steps),
        "shared steps": str(context.start_step),
        "commit": code.get("commit", "")[:12] + (" and changes" if code.get("dirty") == "true" else ""),
        "command": f"inpaint sweep {recipe.name}",
        "masks": ", ".join(recipe.evaluate.masks),
        "digests": scored.protocol.digests,
    }
    return SweepResult(
        name=recipe.name,
        model=swept_model(recipe),
        fields={
            path: domain.model_dump(mode="json", exclude_none=True) for path, domain in sweep.fields.items()
        },
        metrics=sweep.metrics,
        trials=tuple(store.records),
        baselines=baselines.scores,
        split=sweep.split,
        photographs=baselines.photo_count,
        about={key: value for key, value in about.items() if value},
    )


def _mlflow_page(ctx: SweepStepContext, client: MlflowClient | None, run_id: str) -> str:
    """The page of the sweep's run on an MLflow server, for a database the command that shows it; '' without MLflow."""
    if client is None or ctx.settings.tracking is None:
        return ""
    uri = ctx.settings.tracking.uri
    if path_from_sqlite_url(uri):
        return f"mlflow ui --backend-store-uri {quote_for_shell(uri)}"
    return run_page(uri, client.get_run(run_id).info.experiment_id, run_id)


def _write_report(ctx: SweepStepContext, recipe: Recipe, result: SweepResult, output: Storage) -> list[str]:
    """Write the pictures, the table, the HTML page and the best recipe; returns the file names."""
    from pipelines.evaluation.results import EvaluationResult
    from pipelines.sweeps.report.page import sweep_html, sweep_markdown, sweep_pictures

    evaluations = {
        trial.number: EvaluationResult.load(ctx.storage.subfolder(trial.evaluation).read)
        for trial in result.trials
        if trial.evaluation
    }
    best = result.best_group
    yaml = best_recipe(recipe, best.values).to_yaml() if best else ""
    files = dict(sweep_pictures(result, evaluations))
    files["sweep.md"] = sweep_markdown(result).encode()
    files[REPORT_FILE] = sweep_html(result, evaluations, yaml).encode()
    if best:
        files[best_recipe_file(result.name)] = yaml.encode()
    for name, content in files.items():
        output.write(name, content)
    return list(files)


def _log_artifact(client: MlflowClient, run_id: str, output: Storage, name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / Path(name).name
        output.download(name, path)
        client.log_artifact(run_id, str(path))


def _failure_reasons(result: SweepResult) -> str:
    reasons = [f"trial {t.number} ({format_values(t.values)}): {t.reason}" for t in result.trials if t.reason]
    return "; ".join(reasons[:3]) or "the budget allowed none"
