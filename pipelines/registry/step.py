"""The register step: trained weights -> a version with its provenance; champion if it beats the current champion."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mlflow import MlflowClient

from data_prep.manifest import load_manifest
from data_prep.records import to_json
from data_prep.uris import redact_uri
from pipelines.contracts import RegisterConfig, RegisterInputs, RegisterOutputs, RunSettings
from pipelines.durable.mlflow_run import with_mlflow_run
from pipelines.durable.steps import StepContext
from pipelines.evaluation.methods import baseline_methods
from pipelines.evaluation.metrics import ALL_COLUMNS, LPIPS_METRICS, SUMMARY_METRICS
from pipelines.evaluation.photographs import split_photographs
from pipelines.evaluation.results import EvaluationResult
from pipelines.evaluation.significance import card_stats
from pipelines.evaluation.verdict import verdict
from pipelines.plots.images import encode_png, sample_grid
from pipelines.provenance import PROVENANCE_TAG, collect_provenance
from pipelines.recipe import FeatureWeights
from pipelines.registry.alias_moves import REJECTED_TAG
from pipelines.registry.aliases import ConcurrentPromotion, alias_state, promote
from pipelines.registry.card_picture import card_picture
from pipelines.registry.descriptions import describe_outcome
from pipelines.registry.load import load_model
from pipelines.registry.registration import register as register_model
from pipelines.registry.searching import split_column
from pipelines.registry.version_comparison import champion_difference
from pipelines.registry.version_record import VersionRecord
from pipelines.tracking import runs
from pipelines.weights import as_local_folder, load_weights

CARD_PICTURE = "card.png"
PROMOTION_ATTEMPTS = 5  # each after a new comparison, if another version became champion meanwhile


RegisterContext = StepContext[RegisterConfig, RegisterInputs, RunSettings]


@with_mlflow_run
def register(
    ctx: StepContext[RegisterConfig, RegisterInputs, RunSettings], client: MlflowClient | None, run: str
) -> RegisterOutputs:
    """Register the trained weights as a version; promote it if it beats the champion on this run's photographs."""
    assert client is not None, "registering needs MLflow"
    config, uri = ctx.config, _tracking_uri(ctx)
    label, name, metric = config.model_key, config.register_as, config.evaluate.metric
    with as_local_folder(ctx.storage, ctx.inputs.trained.weights) as folder:
        model, info = load_weights(folder)
    evaluation = EvaluationResult.load(ctx.storage.subfolder(ctx.inputs.evaluation.folder).read)
    score = evaluation.score(label, metric)
    ctx.progress(0, 2, "exporting")
    samples = {
        f"samples/{grid.title}.png": encode_png(sample_grid(grid)) for grid in evaluation.sample_grids()
    }
    picture = card_picture(evaluation, label, metric)
    for path, png in [*samples.items(), *([(CARD_PICTURE, picture)] if picture else [])]:
        runs.log_image(client, run, path, png)
    record = replace(
        make_version_record(ctx, client, evaluation),
        samples=tuple(samples),
        card_picture=CARD_PICTURE if picture else "",
    )
    version = register_model(
        model,
        name=name,
        run_id=run,
        step_key=ctx.key,
        tags={"inpaint.recipe": config.recipe_name, "inpaint.metric": f"{metric} {score:.3f}"} | record.tags,
        metrics=metrics_by_band(evaluation, label),
        metadata=info.as_json() | record.as_json(),
        tracking_uri=uri,
    )
    ctx.progress(1, 2, "comparing with the champion")
    is_champion, reason = promote_if_better(ctx, client, version, evaluation, score)
    describe_outcome(client, name, version, is_champion, reason)
    runs.log_tags(
        client, run, {"inpaint.version": version, "inpaint.champion": is_champion, "inpaint.reason": reason}
    )
    return RegisterOutputs(name, version, is_champion, reason)


def make_version_record(
    ctx: RegisterContext, client: MlflowClient, evaluation: EvaluationResult
) -> VersionRecord:
    """The version's provenance; code, packages and Ray job are those of the training run, if it recorded them."""
    trained, shards, config = ctx.inputs.trained, ctx.inputs.shards, ctx.config.evaluate
    provenance = client.get_run(trained.run_id).data.tags.get(PROVENANCE_TAG) if trained.run_id else None
    size = int(evaluation.protocol.sizes[0].partition("x")[0])
    origin = ctx.settings.sweep_origin
    record = {
        "recipe": ctx.settings.recipe_yaml,
        "shards": shards.digest,
        "edges": trained.edge_digests,
        "scored_on": {
            "shards": ctx.storage.subfolder(shards.folder).uri,
            "digest": shards.digest,
            "split": config.split,
            "count": config.max_photos,
            "size": size,
        },
        "protocol": evaluation.protocol.to_dict(),
        "photographs": {masks: dict(Counter(bands)) for masks, bands in evaluation.bands.items()},
        "metric": config.metric,
        "training_run": trained.run_id,
        "sweep": None if origin is None else to_json(origin),
        "source": redact_uri(load_manifest(ctx.storage.subfolder(shards.folder)).source),
        "splits": dict(shards.splits),
        "baselines": {
            method: _rounded(evaluation.to_metrics(method))
            for method in baseline_methods()
            if method in evaluation.methods
        },
        **card_stats(
            evaluation,
            ctx.config.model_key,
            [method for method in baseline_methods() if method in evaluation.methods],
            list(SUMMARY_METRICS),
        ),
        "verdict": verdict(evaluation, ctx.config.model_key, config.metric).sentence("This version"),
    }
    return VersionRecord.from_record(
        record | (json.loads(provenance) if provenance else collect_provenance())
    )


def _rounded(scores: Mapping[str, float]) -> dict[str, float]:
    """The means over all photographs of the metrics that tables show, with six digits."""
    shown = {metric for _, metric, _ in ALL_COLUMNS}
    columns = {column: split_column(column) for column in scores}
    return {
        column: float(f"{scores[column]:.6g}")
        for column, (_, band, metric) in columns.items()
        if not band and metric in shown
    }


def metrics_by_band(evaluation: EvaluationResult, label: str) -> dict[str, float]:
    """A method's means as `masks/metric` and `masks/band/metric`.

    If all masks of a set are in one band, the set's means are that band's too.
    """
    means = evaluation.to_metrics(label)
    for column, value in list(means.items()):
        masks, band, metric = split_column(column)
        bands = set(evaluation.bands.get(masks, ()))
        if not band and len(bands) == 1:
            means[f"{masks}/{bands.pop()}/{metric}"] = value
    return means


def promote_if_better(
    ctx: RegisterContext, client: MlflowClient, version: str, evaluation: EvaluationResult, score: float
) -> tuple[bool, str]:
    """Promote the version if it beats the champion, which is scored again on this run's photographs and masks.

    Returns whether the version is champion, and the reason. If the champion cannot be loaded or scored it stays
    champion: it may only be unreachable, and a user can promote by hand. If another version becomes champion meanwhile,
    compares again. The reason says if classical methods are better than the new champion.
    """
    name, uri = ctx.config.register_as, _tracking_uri(ctx)
    caveat = verdict(evaluation, ctx.config.model_key, ctx.config.evaluate.metric).caveat
    for _ in range(PROMOTION_ATTEMPTS):
        state, comparison = alias_state(name, tracking_uri=uri), None
        if state.version == version:
            return True, "champion already"
        better, reason = True, f"first version; {ctx.config.evaluate.metric} {score:.3f}"
        if state.version is not None:
            better, reason, comparison = compare_with_champion(ctx, state.version, evaluation)
        if not better:
            client.set_model_version_tag(name, version, REJECTED_TAG, reason)
            return False, reason
        reason = f"{reason}; {caveat}" if caveat else reason
        try:
            promote(
                name,
                version,
                reason=reason,
                score=score,
                comparison=comparison,
                expected=state,
                tracking_uri=uri,
            )
            return True, reason
        except ConcurrentPromotion as error:
            reason = str(error)
    return False, reason


def compare_with_champion(
    ctx: RegisterContext, champion: str, evaluation: EvaluationResult
) -> tuple[bool, str, dict[str, Any] | None]:
    """Whether the new version is better than the champion, the reason, and the comparison (None: not possible)."""
    evaluate_config = ctx.config.evaluate
    unused: dict[str, Any] = {"distance": None, "grid_rows": 1}
    if evaluate_config.features:
        deciding = {LPIPS_METRICS[metric] for metric in LPIPS_METRICS if metric == evaluate_config.metric}
        networks = {
            name: file for name, file in evaluate_config.features.networks.items() if name in deciding
        }
        unused["features"] = FeatureWeights(**networks) if networks else None
    champion_config = evaluate_config.model_copy(update=unused)
    photos = list(split_photographs(ctx.storage.subfolder(ctx.inputs.shards.folder), evaluate_config.split))
    try:
        old = load_model(f"models:/{ctx.config.register_as}/{champion}", tracking_uri=_tracking_uri(ctx))
        difference = champion_difference(
            old, evaluation, ctx.config.model_key, photos, champion_config, evaluate_config.metric
        )
    except ValueError as error:
        reason = (
            f"the champion, version {champion}, cannot be compared with here, so it stays champion: {error}"
        )
        return False, reason, None
    reason = f"{difference} of version {champion} on the same photographs"
    return difference.improvement > 0, reason, difference.as_json()


def _tracking_uri(ctx: RegisterContext) -> str:
    assert ctx.settings.tracking is not None, "registering needs MLflow"
    return ctx.settings.tracking.uri
