"""All recorded data of a version: its tags, its MLmodel file, its run and the history of its aliases."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model as ModelFile

from data_prep.uris import path_from_file_url, quote_for_shell, redact_uri
from pipelines.registry.alias_moves import REJECTED_TAG, AliasMove, Rejection, full_history
from pipelines.registry.client import (
    download_artifact,
    find_model,
    find_version,
    list_versions,
    registry_client,
    utc_time,
)
from pipelines.registry.model_card import numbered, version_card
from pipelines.registry.searching import SCORES_TAG, logged_model_id, version_scores
from pipelines.tracking.pages import run_page

MODEL_FIELDS = (
    *(
        "model",
        "options",
        "size",
        "sigma",
        "sigmas",
        "edge_source",
        "needs_edges",
        "takes_edges",
        "true_edges",
    ),
    *("masks", "hole_range", "steps", "seed", "precision", "channels_last", "hardware", "imported"),
)


@dataclass(frozen=True)
class VersionRow:
    """One row of a model's list of versions."""

    name: str
    version: str
    aliases: tuple[str, ...]
    created: str
    """UTC, ISO 8601."""
    run_id: str | None
    tags: dict[str, str]
    """Without the tag that holds the scores."""


@dataclass(frozen=True)
class VersionDetails(VersionRow):
    """All recorded data of a version; None: not on record."""

    metrics: dict[str, float]
    """`masks/band/metric` -> score."""
    model: dict[str, Any] | None
    """The model's name and options, and how it was trained (MODEL_FIELDS)."""
    recipe: str | None
    """As YAML."""
    shards: str | None
    """Digest of the training photographs."""
    edges: dict[str, str] | None
    """sigma -> digest of the edges."""
    sweep: dict[str, Any] | None
    code: dict[str, str] | None
    packages: dict[str, str] | None
    ray: dict[str, Any] | None
    protocol: dict[str, Any] | None
    photographs: dict[str, dict[str, int]] | None
    """masks -> band -> number of photographs."""
    scored_on: dict[str, Any] | None
    curves: dict[str, str] | None
    """`run`: the id of the training's run; `at`: the URL of its curves, or the command that shows them."""
    samples: tuple[str, ...]
    """Paths or runs:/ URIs of the sample grids."""
    signature: dict[str, str] | None
    input_example: str | None
    files: str
    """URI of the version's files."""
    history: tuple[AliasMove, ...]
    """The alias moves to and from this version."""
    card: str
    """Its description in MLflow; computed from the record for versions of earlier releases."""

    def as_json(self) -> dict[str, Any]:
        """The output of `inpaint models show --json`."""
        return vars(self) | {"history": [move.as_json() for move in self.history]}


@dataclass(frozen=True)
class ModelDetails:
    """A registered model and its versions, newest first."""

    name: str
    aliases: dict[str, str]
    """alias -> version."""
    versions: tuple[VersionRow, ...]
    history: tuple[AliasMove, ...]
    card: str
    """Its description in MLflow; '' if it has none."""

    @property
    def rejections(self) -> list[Rejection]:
        """The versions that did not become champion when they were registered, oldest first."""
        rejected = [row for row in self.versions[::-1] if REJECTED_TAG in row.tags]
        return [Rejection(row.version, row.created, row.tags[REJECTED_TAG]) for row in rejected]

    def as_json(self) -> dict[str, Any]:
        """The output of `inpaint models show --json`."""
        rows = [vars(row) for row in self.versions]
        return vars(self) | {"versions": rows, "history": [move.as_json() for move in self.history]}


def show(uri: str, tracking_uri: str | None = None) -> VersionDetails | ModelDetails:
    """Details of a version (NAME@ALIAS, NAME/VERSION), or of a model and all its versions (NAME); models:/ is optional.

    RegistryError: no such model, alias or version.
    """
    with registry_client(tracking_uri) as client:
        name = uri.removeprefix("models:/")
        if not {"@", "/"} & set(name):
            model = find_model(client, name)
            return ModelDetails(
                name=model.name,
                aliases={alias: str(version) for alias, version in sorted(model.aliases.items())},
                versions=tuple(
                    _version_row(version, model.aliases) for version in list_versions(client, name)[::-1]
                ),
                history=tuple(full_history(model.tags)),
                card=model.description or "",
            )
        version = find_version(client, uri)
        model = find_model(client, version.name)
        number = str(version.version)
        mlmodel = read_mlmodel(version)
        metadata: Mapping[str, Any] = (mlmodel and mlmodel.metadata) or {}
        training_run = metadata.get("training_run")
        example = (mlmodel.saved_input_example_info or {}) if mlmodel else {}
        metrics = _version_metrics(client, version)
        card = version.description or version_card(version.name, metadata, metrics, version.run_id)
        return VersionDetails(
            **vars(_version_row(version, model.aliases)),
            metrics=metrics,
            model={key: metadata[key] for key in MODEL_FIELDS if key in metadata} or None,
            recipe=metadata.get("recipe"),
            shards=metadata.get("shards"),
            edges=metadata.get("edges"),
            sweep=metadata.get("sweep"),
            code=metadata.get("code"),
            packages=metadata.get("packages"),
            ray=metadata.get("ray"),
            protocol=metadata.get("protocol"),
            photographs=metadata.get("photographs"),
            scored_on=metadata.get("scored_on"),
            curves={"run": training_run, "at": locate_run(client, training_run)} if training_run else None,
            samples=locate_artifacts(client, version.run_id, metadata.get("samples", ())),
            signature=_signature(mlmodel),
            input_example=example.get("artifact_path"),
            files=client.get_model_version_download_uri(version.name, number),
            history=tuple(move for move in full_history(model.tags) if number in (move.from_, move.to)),
            card=numbered(card, version.name, number),
        )


def locate_run(client: MlflowClient, run: str) -> str:
    """The run's page on an MLflow server, or the command that serves a database's runs."""
    uri = client.tracking_uri
    if not uri.startswith("http"):
        return f"mlflow ui --backend-store-uri {quote_for_shell(uri)}"
    try:
        return run_page(uri, client.get_run(run).info.experiment_id, run)
    except MlflowException:  # deleted, or this user may not read it
        return redact_uri(uri)


def locate_artifacts(client: MlflowClient, run: str | None, paths: Sequence[str]) -> tuple[str, ...]:
    """A run's artifacts as paths on this machine, else as URIs for `mlflow artifacts download -u`."""
    if not paths:
        return ()
    try:
        root = str(client.get_run(str(run)).info.artifact_uri)
    except MlflowException:
        root = ""
    start = path_from_file_url(root) if root.startswith("file:") else f"runs:/{run}"
    return tuple(f"{start}/{path}" for path in paths)


def _version_row(version: ModelVersion, alias_versions: Mapping[str, str]) -> VersionRow:
    number = str(version.version)
    return VersionRow(
        name=version.name,
        version=number,
        aliases=tuple(sorted(alias for alias, other in alias_versions.items() if str(other) == number)),
        created=utc_time(version.creation_timestamp),
        run_id=version.run_id,
        tags={key: text for key, text in sorted(version.tags.items()) if key != SCORES_TAG},
    )


def _version_metrics(client: MlflowClient, version: ModelVersion) -> dict[str, float]:
    logged: dict[str, dict[str, float]] = {}
    if SCORES_TAG not in version.tags:  # registered by an earlier release
        key = logged_model_id(version)
        metrics = client.get_logged_model(key).metrics or []
        logged[key] = {metric.key: metric.value for metric in metrics}
    return dict(sorted(version_scores(version, logged).items()))


def read_mlmodel(version: ModelVersion) -> ModelFile | None:
    """The version's MLmodel file; None if its files were deleted or are unreachable."""
    with tempfile.TemporaryDirectory(prefix="inpaint-show-") as folder:
        try:
            return ModelFile.load(str(download_artifact(version, "MLmodel", folder)))
        except (MlflowException, OSError):
            return None


def _signature(mlmodel: ModelFile | None) -> dict[str, str] | None:
    if mlmodel is None or mlmodel.signature is None:
        return None
    schemas = {"inputs": mlmodel.signature.inputs, "outputs": mlmodel.signature.outputs}
    return {
        key: ", ".join(f"{spec.type} {list(spec.shape)}" for spec in schema)
        for key, schema in schemas.items()
        if schema is not None
    }
