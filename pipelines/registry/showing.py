"""Everything that is on record about a version, from its tags, its own file, its run and the history of its aliases."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from typing import Any

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model as ModelFile

from pipelines.registry import aliases
from pipelines.registry.searching import SCORES, model_id, scores_of
from pipelines.registry.versions import connected, fetch, find_model, find_version, versions_of, when

MODEL = (
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
    *("masks", "hole_range", "steps", "seed", "imported"),
)
RECORDED = (
    "recipe",
    "shards",
    "edges",
    "sweep",
    "code",
    "packages",
    "ray",
    "protocol",
    "photographs",
    "scored_on",
)


def show(uri: str, tracking_uri: str | None = None) -> dict[str, Any]:
    """A version (models:/NAME@ALIAS, models:/NAME/VERSION), or for a plain NAME the model with all its versions.

    Of a version, beside what its row among its model's says: metrics (`masks/band/metric`), protocol, photographs (how
    many in each band), model (what was trained, and how), shards and edges (digests), code, packages, ray, sweep,
    recipe (YAML), curves (where they are), samples (where the sample grids are), signature, input_example, files (where
    they are), history. What is not on record is None. RegistryError in one line: no such model, alias or version.
    """
    with connected(tracking_uri) as client:
        if not uri.startswith("models:"):
            model = find_model(client, uri)
            return {
                "name": model.name,
                "aliases": {alias: str(version) for alias, version in sorted(model.aliases.items())},
                "versions": [_row(version, model.aliases) for version in versions_of(client, uri)][::-1],
                "history": aliases.every_move(model.tags),
            }
        version = find_version(client, uri)
        model = find_model(client, version.name)
        number = str(version.version)
        described = _described(version)
        metadata: Mapping[str, Any] = (described and described.metadata) or {}
        training = metadata.get("training_run")
        return {
            **_row(version, model.aliases),
            "metrics": _metrics(client, version),
            "model": {key: metadata[key] for key in MODEL if key in metadata} or None,
            **{key: metadata.get(key) for key in RECORDED},
            "curves": {"run": training, "at": run_place(client, training)} if training else None,
            "samples": [artifact_place(client, version.run_id, path) for path in metadata.get("samples", ())],
            "signature": _signature(described),
            "input_example": (described.saved_input_example_info or {}).get("artifact_path")
            if described
            else None,
            "files": client.get_model_version_download_uri(version.name, number),
            "history": [
                move for move in aliases.every_move(model.tags) if number in (move["from"], move["to"])
            ],
        }


def run_place(client: MlflowClient, run: str) -> str:
    """Where a run is looked at: a page of a server, or the run's id in a database."""
    uri = client.tracking_uri
    if not uri.startswith("http"):
        return f"mlflow ui --backend-store-uri {uri}"
    try:
        return f"{uri}/#/experiments/{client.get_run(run).info.experiment_id}/runs/{run}"
    except MlflowException:  # deleted, or not for this user to see
        return uri


def artifact_place(client: MlflowClient, run: str | None, path: str) -> str:
    """Where an artifact of a run is: its path on this machine, else what `mlflow artifacts download -u` takes."""
    try:
        root = str(client.get_run(str(run)).info.artifact_uri)
    except MlflowException:
        root = ""
    return f"{root.removeprefix('file://')}/{path}" if root.startswith("file://") else f"runs:/{run}/{path}"


def _row(version: ModelVersion, holders: Mapping[str, str]) -> dict[str, Any]:
    number = str(version.version)
    return {
        "name": version.name,
        "version": number,
        "aliases": sorted(alias for alias, holder in holders.items() if str(holder) == number),
        "created": when(version.creation_timestamp),
        "run_id": version.run_id,
        "tags": {key: text for key, text in sorted(version.tags.items()) if key != SCORES},
    }


def _metrics(client: MlflowClient, version: ModelVersion) -> dict[str, float]:
    logged: dict[str, dict[str, float]] = {}
    if SCORES not in version.tags:  # an earlier release's
        key = model_id(version)
        metrics = client.get_logged_model(key).metrics or []
        logged[key] = {metric.key: metric.value for metric in metrics}
    return dict(sorted(scores_of(version, logged).items()))


def _described(version: ModelVersion) -> ModelFile | None:
    """The version's own file; None when its files are gone, or out of reach."""
    with tempfile.TemporaryDirectory(prefix="inpaint-show-") as folder:
        try:
            return ModelFile.load(str(fetch(version, "MLmodel", folder)))
        except (MlflowException, OSError):
            return None


def _signature(described: ModelFile | None) -> dict[str, str] | None:
    if described is None or described.signature is None:
        return None
    ends = {"inputs": described.signature.inputs, "outputs": described.signature.outputs}
    return {
        key: ", ".join(f"{spec.type} {list(spec.shape)}" for spec in schema)
        for key, schema in ends.items()
        if schema is not None
    }
