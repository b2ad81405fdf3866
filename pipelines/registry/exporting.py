"""From a trained model to a version in the registry: exported, checked against the model, registered exactly once.

A version is a program made by torch.export with its weights: it needs mlflow and torch, none of this project's code
and no pickle. It takes one float32 tensor [B,5,H,W] (RGB in [0,1]; mask, 1 = hole; edge) and gives [B,3,H,W]. Beside
the program lies a checkpoint folder, from which the whole model is built again: critics too, and for other formats.
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
from mlflow.exceptions import MlflowException
from mlflow.models import Model as ModelFile
from mlflow.models import ModelSignature
from mlflow.types import Schema, TensorSpec

from models.base import Model
from pipelines.provenance import made_by
from pipelines.registry.program import PROGRAM, clean_program
from pipelines.registry.searching import SCORES, scores_tag
from pipelines.registry.versions import CANDIDATE, CHECKPOINT, NAME, RegistryError, connected, versions_of
from pipelines.training.weights import save_weights

TOLERANCE = 1e-5  # of the exported program against the eager one
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
    """The version of `name` that belongs to `step_key`, made if it is not there yet, under the alias `candidate`.

    `metadata` (JSON-able; kept in the model's own file) needs `sigma` when the model takes edges, and should have
    `size` (training size in pixels) and `hole_range` (smallest and largest share of hole trained on); code, packages and
    Ray job are this process's where it does not say.
    `example` float32 [B >= 2,5,H,W], of a size that is a multiple of nothing. Whatever dies on the way, a repetition
    ends with one version: it appears in one call with all its tags, after everything else is there.
    ValueError: name or metadata. RegistryError: the registry, or an export that does not equal the model.
    """
    if not NAME.fullmatch(name):
        raise ValueError(f"{name!r} cannot name a registered model: letters, digits, '_', '-' and '.' can")
    described = describe(model, {**made_by(), **(metadata or {})})
    with connected(tracking_uri, patient=True) as client:
        version = _only_version(client, name, step_key)
        if version is None:
            own = {
                "step_key": step_key,
                "model": model.name,
                **{key: str(described[key]) for key in ("sigma", "size") if described.get(key) is not None},
                **{key: str(value) for key, value in (tags or {}).items()},
            }
            with tempfile.TemporaryDirectory(prefix="inpaint-export-") as folder:
                export(model, Path(folder, "model"), described, example)
                model_id = _upload(client, Path(folder, "model"), name, run_id, own, metrics or {})
            _create_model(client, name)
            tags = own | {SCORES: scores_tag(metrics or {})}
            client.create_model_version(name, f"models:/{model_id}", run_id, tags=tags, model_id=model_id)
            # a request answered too late is sent again, and makes a second version: look, and keep the first
            version = _only_version(client, name, step_key)
        if version is None:
            raise RegistryError(
                f"the new version of {name} has vanished from the registry: run the command again"
            )
        newest = client.get_registered_model(name).aliases.get(CANDIDATE)
        if newest is None or int(newest) < int(version):
            client.set_registered_model_alias(name, CANDIDATE, version)
        return version


def describe(model: Model, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What `load_model` must know of a version: its model and options, whether it takes edges, and `metadata`."""
    for key, value in metadata.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"metadata.{key} cannot be kept as JSON: {error}") from None
    if model.needs_edges and not isinstance(metadata.get("sigma"), int | float):
        raise ValueError(f"metadata.sigma is missing: {model.name} takes edges, and Canny needs their sigma")
    own = {
        "model": model.name,
        "options": dataclasses.asdict(model.options),
        "needs_edges": bool(model.needs_edges),
        "takes_edges": bool(model.takes_edges),
        "true_edges": bool(model.true_edges),
    }
    described: dict[str, Any] = json.loads(json.dumps({**metadata, **own}, default=str))
    return described


def export(model: Model, folder: Path, metadata: dict[str, Any], example: np.ndarray | None = None) -> None:
    """Write the MLflow model `folder`: the exported program, and nothing that needs code or pickle to be read.

    RegistryError when the program does not equal the model on another size and batch than the example's.
    """
    module = model.completion().cpu().eval()
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
    (folder / CHECKPOINT).mkdir()
    save_weights(folder / CHECKPOINT, model, {}, {**metadata, "name": model.name})
    try:
        clean_program(folder / "data" / PROGRAM)
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
    """float32 [2,5,61,91]: a batch and a size from which torch.export concludes nothing, in few digits (kept as text)."""
    rng = np.random.default_rng(0)
    example = rng.integers(0, 9, (2, 5, 61, 91)).astype(np.float32) / 8
    example[:, 3:] = 0
    example[:, 3, 20:40, 30:52] = 1
    example[:, 4, ::9, 5:25] = 1
    return example


def _upload(
    client: MlflowClient,
    folder: Path,
    name: str,
    run_id: str,
    tags: dict[str, str],
    metrics: Mapping[str, float],
) -> str:
    """Log the folder as a model of the run; left half-way it belongs to no version, and nobody sees it."""
    run = client.get_run(run_id).info
    model_id = client.create_logged_model(run.experiment_id, name, run_id, tags).model_id
    described = ModelFile.load(str(folder))
    described.model_id, described.run_id = model_id, run_id
    described.save(str(folder / "MLmodel"))
    client.log_model_artifacts(model_id, str(folder))
    client.finalize_logged_model(model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(model_id, step=0)])
    # stamped with the run's own start: a repetition is the same point
    points = [Metric(key, float(value), run.start_time, 0, model_id) for key, value in metrics.items()]
    for start in range(0, len(points), 1000):
        client.log_batch(run_id, metrics=points[start : start + 1000])
    return model_id


def _create_model(client: MlflowClient, name: str) -> None:
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _only_version(client: MlflowClient, name: str, step_key: str) -> str | None:
    """The first version tagged with the key; later ones are copies of it, and are deleted."""
    found = versions_of(client, name, f"tags.step_key = '{step_key}'")
    for copy in found[1:]:
        client.delete_model_version(name, str(copy.version))
    return str(found[0].version) if found else None
