"""The steps `evaluate` (a run's models), `baselines` (shared by a sweep's trials) and `score` (one trial)."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from mlflow import MlflowClient

from data_prep.storage import Storage
from pipelines.contracts import (
    BaselinesInputs,
    BaselinesOutputs,
    EvaluateInputs,
    EvaluateOutputs,
    RunSettings,
    ScoreInputs,
    ScoreOutputs,
)
from pipelines.durable.mlflow_run import with_mlflow_run
from pipelines.durable.steps import StepContext
from pipelines.evaluation.evaluate import evaluate as evaluate_methods
from pipelines.evaluation.evaluate import extract_truth_features
from pipelines.evaluation.methods import baseline_methods as classical_methods
from pipelines.evaluation.model_methods import model_method
from pipelines.evaluation.photographs import split_photographs
from pipelines.evaluation.results import EvaluationResult
from pipelines.evaluation.score_tasks import CheckpointRef, MethodSpecs, RayBatchRunner, load_methods
from pipelines.evaluation.tables import table_markdown
from pipelines.plots.images import encode_png, sample_grid
from pipelines.recipe import EvaluationConfig
from pipelines.tracking import runs
from pipelines.tracking.datasets import log_dataset
from pipelines.weights import as_local_folder, load_weights

TRUTH_FILE = "truth.npy"


@with_mlflow_run
def evaluate(
    ctx: StepContext[EvaluationConfig, EvaluateInputs, RunSettings], client: MlflowClient | None, run_id: str
) -> EvaluateOutputs:
    """Score all trained models and the classical baselines on the held-out photographs, under one protocol.

    Large evaluations are scored in batches, one Ray task per batch.
    """
    photos = split_photographs(ctx.storage.subfolder(ctx.inputs.shards.folder), ctx.config.split)
    references = {
        key: CheckpointRef(ctx.storage, result.weights) for key, result in ctx.inputs.trained.items()
    }
    methods: MethodSpecs = (*classical_methods().items(), *references.items())
    result = evaluate_methods(
        load_methods(methods), photos, ctx.config, progress=ctx.progress, run_batches=RayBatchRunner(methods)
    )
    files = result.save(ctx.storage.subfolder(ctx.attempt_folder).write)
    if client:
        for method in result.methods:
            runs.log_metrics(
                client, run_id, {f"{method}/{k}": v for k, v in result.to_metrics(method).items()}
            )
        runs.log_text(client, run_id, "table.md", table_markdown(result))
        runs.log_tags(client, run_id, result.protocol.digest_tags)
        log_dataset(client, run_id, ctx.storage.subfolder(ctx.inputs.shards.folder), ctx.config.split)
        _log_grids(client, run_id, result)
    return EvaluateOutputs(
        files=tuple(f"{ctx.attempt_folder}/{file}" for file in files),
        folder=ctx.attempt_folder,
        scores={method: result.score(method, ctx.config.metric) for method in references},
    )


def baselines(ctx: StepContext[EvaluationConfig, BaselinesInputs, RunSettings]) -> BaselinesOutputs:
    """Score the classical methods on the sweep's photographs, and extract the photographs' features for all trials."""
    photos = list(split_photographs(ctx.storage.subfolder(ctx.inputs.shards.folder), ctx.config.split))
    config = ctx.config.model_copy(update={"grid_rows": 0})
    truth = extract_truth_features(photos, config)
    result = evaluate_methods(
        classical_methods(), photos, config, progress=ctx.progress, truth_features=truth
    )
    output, first = ctx.storage.subfolder(ctx.attempt_folder), next(iter(result.bands))
    files = result.save(output.write)
    _save_array(output, truth)
    reasons = [row["reason"] for row in result.distances.get(first, {}).values() if "reason" in row]
    reasons += [text for row in result.set_scores.get(first, {}).values() for text in row["reasons"].values()]
    return BaselinesOutputs(
        files=tuple(f"{ctx.attempt_folder}/{file}" for file in (*files, TRUTH_FILE)),
        folder=ctx.attempt_folder,
        truth_features=f"{ctx.attempt_folder}/{TRUTH_FILE}",
        scores={method: _metrics_of(result, method) for method in result.methods},
        photo_count=len(result.photos),
        no_distance_reason="; ".join(dict.fromkeys(reasons)),
    )


def score(ctx: StepContext[EvaluationConfig, ScoreInputs, RunSettings]) -> ScoreOutputs:
    """Score a trial's weights on the sweep's photographs."""
    with as_local_folder(ctx.storage, ctx.inputs.trained.weights) as folder:
        model, info = load_weights(folder)
    photos = list(split_photographs(ctx.storage.subfolder(ctx.inputs.shards.folder), ctx.config.split))
    truth = _load_array(ctx.storage, ctx.inputs.baselines.truth_features)
    result = evaluate_methods({"trial": model_method(model, info)}, photos, ctx.config, truth_features=truth)
    files = result.save(ctx.storage.subfolder(ctx.attempt_folder).write)
    if (tracking := ctx.settings.tracking) and (run := ctx.settings.trial_run_id):
        client = tracking.client()
        runs.log_metrics(client, run, result.to_metrics("trial"))
        runs.log_tags(client, run, result.protocol.digest_tags)
        log_dataset(client, run, ctx.storage.subfolder(ctx.inputs.shards.folder), ctx.config.split)
        _log_grids(client, run, result)
    return ScoreOutputs(
        files=tuple(f"{ctx.attempt_folder}/{file}" for file in files),
        folder=ctx.attempt_folder,
        scores=_metrics_of(result, "trial"),
    )


def _log_grids(client: MlflowClient, run_id: str, result: EvaluationResult) -> None:
    for grid in result.sample_grids():
        runs.log_image(client, run_id, f"samples/{grid.title}.png", encode_png(sample_grid(grid)))


def _metrics_of(result: EvaluationResult, method: str) -> dict[str, float]:
    """A method's means and distances on the first mask set."""
    row = result.row(method)
    return row.metrics | result.set_metrics(method, row.masks)


def _save_array(storage: Storage, array: np.ndarray) -> None:
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / TRUTH_FILE, array, allow_pickle=False)
        storage.upload(Path(folder) / TRUTH_FILE, TRUTH_FILE)


def _load_array(storage: Storage, key: str) -> np.ndarray:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / TRUTH_FILE
        storage.download(key, path)
        array: np.ndarray = np.load(path, allow_pickle=False)
        return array
