"""What a version's page shows beyond the snapshot: its MLmodel file, and the evaluation and curves in the storage.

Versions do not change, so all of this is read once per version and kept.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from mlflow.exceptions import MlflowException

from data_prep.storage import Storage, StorageError, open_storage
from data_prep.uris import path_from_sqlite_url, quote_for_shell
from pipelines.evaluation.metrics import SET_METRICS, SUMMARY_METRICS
from pipelines.evaluation.results import EvaluationResult
from pipelines.evaluation.significance import mean_stats
from pipelines.evaluation.verdict import TITLES
from pipelines.registry.client import registry_client
from pipelines.registry.describe import read_mlmodel
from pipelines.registry.searching import logged_model_id, split_column
from pipelines.studio.registry_snapshot import REGISTRY_LOCK, VersionSummary
from pipelines.tracking.pages import logged_model_page, run_page, version_page
from pipelines.training.curves import TrainingCurves, read_curves

STEP_KEY = re.compile(r"[0-9a-f]{8,64}-[\w.-]{1,200}")
"""Of a step's manifest. A version's tag names it, and anybody may write tags."""
UNREADABLE = (StorageError, ValueError, LookupError, TypeError, OSError)
"""What reading a step of a storage raises that lacks it, or that another release wrote."""


@dataclass(frozen=True)
class VersionFiles:
    """A version's recorded metadata, and where MLflow shows it."""

    metadata: Mapping[str, Any]
    """Of the MLmodel file; empty if the version's files are gone."""
    version_page: str
    """Address of MLflow's page; '' if the registry is a database."""
    run_page: str
    logged_model_page: str
    curves_page: str
    """Of the training's run."""
    command: str
    """Opens MLflow's pages for a database; '' for a server."""


@dataclass(frozen=True)
class Interval:
    low: float
    high: float


@dataclass(frozen=True)
class StoredScores:
    """What the storage's evaluation adds to a version's means."""

    intervals: Mapping[str, Interval] = field(default_factory=dict)
    """masks/band/metric or masks/metric -> 95 % interval of the mean over photographs."""
    baselines: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Untrained method -> masks/band/metric or masks/metric -> mean."""
    counts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """masks -> band -> photographs; "all": in all bands."""
    by_band: bool = False
    """Whether bands have intervals: the storage holds the evaluation."""


def version_files(tracking_uri: str, version: VersionSummary) -> VersionFiles:
    """RegistryError: the version was deleted, or the registry cannot be reached."""
    try:
        return _version_files(tracking_uri, version.name, version.version, version.created)
    except _FilesGone as error:
        return error.rest


class _FilesGone(Exception):
    """Keeps a version whose files cannot be read now out of the cache."""

    def __init__(self, rest: VersionFiles) -> None:
        super().__init__()
        self.rest = rest


@lru_cache(maxsize=512)
def _version_files(tracking_uri: str, name: str, number: str, created: str) -> VersionFiles:
    with REGISTRY_LOCK, registry_client(tracking_uri) as client:
        version = client.get_model_version(name, number)
        mlmodel = read_mlmodel(version)
        metadata = dict((mlmodel and mlmodel.metadata) or {})
        uri = client.tracking_uri
        is_server = uri.startswith("http")
        pages: list[str] = []
        logged_page = ""
        for run in (version.run_id, metadata.get("training_run")):
            page = ""
            if run and is_server:
                with suppress(MlflowException):  # deleted, or this user may not read it
                    experiment = client.get_run(run).info.experiment_id
                    page = run_page(uri, experiment, run)
                    if run == version.run_id:
                        logged_page = logged_model_page(uri, experiment, logged_model_id(version))
            pages.append(page)
    command = "" if is_server else _mlflow_command(uri)
    files = VersionFiles(metadata, version_page(uri, name, number), pages[0], logged_page, pages[1], command)
    if mlmodel is None:
        raise _FilesGone(files)
    return files


def _mlflow_command(uri: str) -> str:
    """The command that opens MLflow's pages for a database, without an absolute path."""
    address, path = '"$MLFLOW_TRACKING_URI"', path_from_sqlite_url(uri)
    if path and not (relative := os.path.relpath(path)).startswith(".."):
        address = quote_for_shell(f"sqlite:///{relative}")
    return f"mlflow ui --backend-store-uri {address}"


def stored_scores(storage_uri: str, version: VersionSummary, metadata: Mapping[str, Any]) -> StoredScores:
    """Intervals and untrained methods: by band from the storage's evaluation, else over all photographs as recorded."""
    with suppress(*UNREADABLE):
        evaluated = _evaluation_scores(storage_uri, version.tags.get("step_key", ""))
        if _is_of(evaluated, version):
            return evaluated
    recorded = metadata.get("intervals") or {}
    photographs = metadata.get("photographs") or {}
    return StoredScores(
        intervals={column: Interval(*ends) for column, ends in recorded.items()},
        baselines={
            TITLES.get(method, method): scores for method, scores in (metadata.get("baselines") or {}).items()
        },
        counts={masks: {**bands, "all": sum(bands.values())} for masks, bands in photographs.items()},
    )


def _is_of(scores: StoredScores, version: VersionSummary) -> bool:
    """Whether a storage's scores belong to the version: another registry's version can have the same step key."""
    return {split_column(column)[0] for column in version.scores} <= set(scores.counts)


@lru_cache(maxsize=256)
def _evaluation_scores(storage_uri: str, step_key: str) -> StoredScores:
    """UNREADABLE: the storage has no such step, or cannot be read."""
    storage = open_storage(storage_uri)
    manifest = _manifest(storage, step_key)
    folder = _manifest(storage, str(manifest["inputs"]["evaluate"]))["value"]["folder"]
    evaluation = EvaluationResult.from_dict(json.loads(storage.read(f"{folder}/evaluation.json")))
    return band_scores(evaluation, str(manifest["config"]["model_key"]))


def band_scores(evaluation: EvaluationResult, label: str) -> StoredScores:
    """Intervals of a method's means in every band, and the means of the untrained methods of the evaluation."""
    if label not in evaluation.methods:
        raise ValueError(f"the evaluation has no method {label!r}")
    alone = replace(evaluation, methods=(label,))
    intervals: dict[str, Interval] = {}
    baselines: dict[str, dict[str, float]] = {}
    counts: dict[str, dict[str, int]] = {}
    for masks, bands in evaluation.bands.items():
        counts[masks] = {**Counter(bands), "all": len(bands)}
        for band in ["all", *dict.fromkeys(bands)]:
            prefix = masks if band == "all" else f"{masks}/{band}"
            metrics = [metric for metric in SUMMARY_METRICS if metric not in SET_METRICS]
            for (_, metric), stats in mean_stats(alone, masks, metrics, band).items():
                if stats.low is not None and stats.high is not None:
                    intervals[f"{prefix}/{metric}"] = Interval(stats.low, stats.high)
    for method in evaluation.methods:
        if method in TITLES:
            means = evaluation.to_metrics(method)
            for column, value in list(means.items()):
                masks, band, metric = split_column(column)
                if not band and len(set(bands := evaluation.bands[masks])) == 1:
                    means[f"{masks}/{bands[0]}/{metric}"] = value  # the set's means are its only band's too
            baselines[TITLES[method]] = means
    return StoredScores(intervals, baselines, counts, by_band=True)


def stored_curves(storage_uri: str, version: VersionSummary) -> TrainingCurves | None:
    """The training's curves from the storage; None: it has none of this version."""
    with suppress(*UNREADABLE):
        return _stored_curves(storage_uri, version.tags.get("step_key", ""))
    return None


@lru_cache(maxsize=64)
def _stored_curves(storage_uri: str, step_key: str) -> TrainingCurves:
    storage = open_storage(storage_uri)
    inputs = _manifest(storage, step_key)["inputs"]
    train = [str(key) for name, key in inputs.items() if str(name).startswith("train")]
    return read_curves(storage, _manifest(storage, train[0])["value"]["weights"])


def _manifest(storage: Storage, key: str) -> dict[str, Any]:
    """A finished step's record. KeyError: `key` is not a step's key."""
    if not STEP_KEY.fullmatch(key):
        raise KeyError(key)
    record: dict[str, Any] = json.loads(storage.read(f"manifests/{key}.json"))
    return record
