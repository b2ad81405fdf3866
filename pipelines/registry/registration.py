"""Registers a trained model as a version: exports it, checks the export against the model, registers it exactly once.

A version is a torch.export program with its weights: it needs mlflow and torch, but no pickle and none of this
project's code. It maps one float32 tensor [B,5,H,W] (RGB in [0,1]; mask, 1 = hole; edge) to [B,3,H,W]. A checkpoint
folder beside the program holds the whole model, discriminators included, for exports to other formats.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Mapping
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

import mlflow.pytorch
import numpy as np
import torch
from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput, Metric
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model as ModelFile
from mlflow.models import ModelSignature
from mlflow.types import Schema, TensorSpec

from models.base import Model
from pipelines.names import check_model_name
from pipelines.provenance import collect_provenance
from pipelines.registry.client import (
    CANDIDATE,
    CHECKPOINT_FOLDER,
    RegistryError,
    list_versions,
    registry_client,
)
from pipelines.registry.descriptions import describe_model, describe_version
from pipelines.registry.model_card import version_card
from pipelines.registry.program_check import PROGRAM_FILE, sanitize_program
from pipelines.registry.searching import SCORES_TAG, scores_json
from pipelines.tracking.metric_names import valid_name
from pipelines.weights import CheckpointInfo, save_weights

TOLERANCE = 1e-5  # maximum absolute difference between the exported program and the eager completion
SIGNATURE = ModelSignature(
    Schema([TensorSpec(np.dtype(np.float32), (-1, 5, -1, -1))]),
    Schema([TensorSpec(np.dtype(np.float32), (-1, 3, -1, -1))]),
)


def register(
    model: Model,
    *,
    name: str,
    run_id: str,
    step_key: str,
    tags: Mapping[str, str] | None = None,
    metrics: Mapping[str, float] | None = None,
    metadata: Mapping[str, Any] | None = None,
    example: np.ndarray | None = None,
    tracking_uri: str | None = None,
) -> str:
    """Register the model once per `step_key` and set the alias `candidate` on it; returns the version.

    metadata: JSON values, stored in the MLmodel file. `sigma` is required if the model needs edges; `size` (training
    size in pixels) and `hole_range` (smallest and largest hole trained on, as fractions of the image) should be given;
    code, packages and Ray job default to those of this process.
    example: float32 [B >= 2,5,H,W]; odd H and W, so that torch.export specializes on no multiple.
    If the process dies at any point, repeating the call ends with one version: a single request creates it with all
    its tags, after everything else is stored.
    ValueError: invalid name or metadata. RegistryError: the registry fails, or the export differs from the model.
    """
    check_model_name(name)
    metrics = metrics or {}
    full_metadata = model_metadata(model, {**collect_provenance(), **(metadata or {})})
    with registry_client(tracking_uri, keep_retries=True) as client:
        registered = _keep_first_version(client, name, step_key)
        card = version_card(name, full_metadata, metrics, run_id)
        if registered is None:
            recorded = {key: full_metadata.get(key) for key in ("sigma", "size")}
            model_tags = {
                "step_key": step_key,
                "model": model.name,
                **{key: str(value) for key, value in recorded.items() if value is not None},
                **{key: str(value) for key, value in (tags or {}).items()},
            }
            with tempfile.TemporaryDirectory(prefix="inpaint-export-") as folder:
                export_model(model, Path(folder, "model"), full_metadata, example)
                model_id = _log_model(client, Path(folder, "model"), name, run_id, model_tags, metrics)
            _ensure_registered_model(client, name)
            client.create_model_version(
                name,
                f"models:/{model_id}",
                run_id,
                tags=model_tags | {SCORES_TAG: scores_json(metrics)},
                description=card,
                model_id=model_id,
            )
            # MLflow resends a request that is answered too late, which creates a second version: keep the first
            registered = _keep_first_version(client, name, step_key)
        if registered is None:
            raise RegistryError(
                f"the new version of {name} has vanished from the registry: run the command again"
            )
        version, registered_model = str(registered.version), client.get_registered_model(name)
        describe_version(client, registered, card)
        describe_model(client, registered_model, model.name, str(full_metadata.get("metric", "")))
        newest = registered_model.aliases.get(CANDIDATE)
        if newest is None or int(newest) < int(version):
            client.set_registered_model_alias(name, CANDIDATE, version)
        return version


def model_metadata(model: Model, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata that `load_model` needs: model, options, needs_edges, takes_edges and true_edges, and `metadata`.

    ValueError: a value that is not JSON, or no `sigma` for a model that needs edges.
    """
    for key, value in metadata.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"metadata.{key} cannot be written as JSON: {error}") from None
    if model.needs_edges and not isinstance(metadata.get("sigma"), int | float):
        raise ValueError(f"metadata.sigma is missing: {model.name} takes edges, and Canny needs their sigma")
    model_fields = {
        "model": model.name,
        "options": dataclasses.asdict(model.options),
        "needs_edges": bool(model.needs_edges),
        "takes_edges": bool(model.takes_edges),
        "true_edges": bool(model.uses_true_edges),
    }
    result: dict[str, Any] = json.loads(json.dumps({**metadata, **model_fields}, default=str))
    checkpoint_info(model, result)  # raises for a field of the wrong type
    return result


def checkpoint_info(model: Model, metadata: Mapping[str, Any]) -> CheckpointInfo:
    """The model.json of the version's checkpoint folder. ValueError: a field has the wrong type."""
    return CheckpointInfo.from_record({**metadata, "name": model.name}, "metadata")


def export_model(
    model: Model, folder: Path, metadata: dict[str, Any], example: np.ndarray | None = None
) -> None:
    """Write the MLflow model `folder`: the exported program and a checkpoint, without code or pickles.

    RegistryError: the program's output differs from the model's on another size and batch than the example's.
    """
    module = model.frozen_completion().cpu().eval()
    example = example_input() if example is None else np.asarray(example, np.float32)
    packages = [
        f"{package}=={installed(package).partition('+')[0]}" for package in ("mlflow", "torch", "numpy")
    ]
    mlflow.pytorch.save_model(
        module,
        str(folder),
        signature=SIGNATURE,
        input_example=example,
        pip_requirements=packages,
        metadata=metadata,
        serialization_format="pt2",
    )
    (folder / CHECKPOINT_FOLDER).mkdir()
    save_weights(folder / CHECKPOINT_FOLDER, model, {}, checkpoint_info(model, metadata))
    try:
        sanitize_program(folder / "data" / PROGRAM_FILE)
    except ValueError as error:
        raise RegistryError(
            f"the exported {model.name} is more than tensors and operators on them, and would not be loaded: {error}"
        ) from error
    program = mlflow.pytorch.load_model(str(folder))
    other = torch.from_numpy(np.ascontiguousarray(example[:1, :, 3:, :-4]))
    with torch.no_grad():
        difference = float((program(other) - module(other)).abs().max())
    if not difference <= TOLERANCE:
        raise RegistryError(
            f"the exported {model.name} differs from the model by {difference:.1e} on an input of "
            f"{tuple(other.shape)}: nothing was registered"
        )


def example_input() -> np.ndarray:
    """float32 [2,5,61,91], from which torch.export specializes no dimension; few digits, as MLflow stores it as text."""
    rng = np.random.default_rng(0)
    example = rng.integers(0, 9, (2, 5, 61, 91)).astype(np.float32) / 8
    example[:, 3:] = 0
    example[:, 3, 20:40, 30:52] = 1
    example[:, 4, ::9, 5:25] = 1
    return example


def _log_model(
    client: MlflowClient,
    folder: Path,
    name: str,
    run_id: str,
    tags: dict[str, str],
    metrics: Mapping[str, float],
) -> str:
    """Log the folder as a logged model of the run; returns its id. An incomplete one is part of no version."""
    run = client.get_run(run_id).info
    # MLflow allows dots in a registered model's name, but not in a logged model's
    label = name.replace(".", "-")
    model_id = client.create_logged_model(run.experiment_id, label, run_id, tags).model_id
    mlmodel = ModelFile.load(str(folder))
    mlmodel.model_id, mlmodel.run_id = model_id, run_id
    mlmodel.save(str(folder / "MLmodel"))
    client.log_model_artifacts(model_id, str(folder))
    client.finalize_logged_model(model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(model_id, step=0)])
    # the run's start as the timestamp: a repeated call logs the same points
    points = [
        Metric(valid_name(key), float(value), run.start_time, 0, model_id) for key, value in metrics.items()
    ]
    for start in range(0, len(points), 1000):  # MLflow's limit per request
        client.log_batch(run_id, metrics=points[start : start + 1000])
    return model_id


def _ensure_registered_model(client: MlflowClient, name: str) -> None:
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _keep_first_version(client: MlflowClient, name: str, step_key: str) -> ModelVersion | None:
    """The first version with this step key; later ones, which are copies, are deleted. None: there is none yet."""
    versions = list_versions(client, name, f"tags.step_key = '{step_key}'")
    for duplicate in versions[1:]:
        client.delete_model_version(name, str(duplicate.version))
    return versions[0] if versions else None
