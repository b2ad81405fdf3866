"""Loads a model from the registry (the exported program of a version) or from a checkpoint folder."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow.pytorch
import torch
import yaml
from mlflow.entities.model_registry import ModelVersion
from mlflow.models import Model as ModelFile
from torch import Tensor

from data_prep.records import RecordError
from models import build_model, model_class
from models.base import Model
from pipelines.environment import set_environment
from pipelines.errors import error_text
from pipelines.registry.client import (
    MODEL_HINT,
    VERSION_PATTERN,
    NotRegistered,
    RegistryError,
    download_artifact,
    find_folder,
    find_version,
    registry_client,
)
from pipelines.registry.loaded_model import LoadedModel, VersionFacts
from pipelines.registry.program_check import PROGRAM_FILE, sanitize_program
from pipelines.renamed import model_options
from pipelines.weights import INFO_FILE, WEIGHTS_FILE, CheckpointInfo, load_weights

SAFE_ENVIRONMENT = {
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_ALLOW_MODEL_CODE_EXECUTION": "false",
    "TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1",
}


def load_model(uri: str | Path, *, tracking_uri: str | None = None, device: str = "cpu") -> LoadedModel:
    """Load a checkpoint folder (model.safetensors and model.json), NAME@ALIAS, NAME/VERSION, or NAME: its champion, else
    its newest version.

    An existing folder comes before a registered model of the same name; models:/NAME is always the registered one.
    Loading unpickles nothing and runs no code that comes with a model. RegistryError: no such folder, name, alias or
    version (the message lists the existing ones), a server that does not answer, a damaged checkpoint.
    """
    text = str(uri)
    if folder := find_folder(text):
        return _load_checkpoint(folder, device)
    if text.startswith("models:"):
        return _load_version(text, tracking_uri, device)
    if isinstance(uri, Path) or not VERSION_PATTERN.fullmatch(text):
        raise RegistryError(f"{text!r} is not a model: there is no such folder; {MODEL_HINT}")
    try:
        return _load_version(text, tracking_uri, device)
    except NotRegistered as error:
        raise NotRegistered(f"{error}; there is no folder {text!r} either") from error


def _load_version(uri: str, tracking_uri: str | None, device: str) -> LoadedModel:
    with registry_client(tracking_uri) as client, safe_loading():
        version = find_version(client, uri)
        with tempfile.TemporaryDirectory(prefix="inpaint-model-") as folder:
            try:
                mlmodel, program = load_program(version, folder, device)
            except RegistryError:
                raise
            except (OSError, KeyError, RuntimeError, TypeError, AttributeError, AssertionError) as error:
                raise RegistryError(
                    f"{uri} (version {version.version}) cannot be read from {version.source}: {_short_message(error)}"
                ) from error
    info = _version_info(mlmodel, uri)
    aliases = tuple(sorted(version.aliases))
    return LoadedModel(
        program, version.name, str(version.version), info, _hole_checker(info), device, aliases
    )


def read_facts(name: str, version: str, *, tracking_uri: str | None = None) -> VersionFacts:
    """What the MLmodel file of a registered version records, without its program. RegistryError as for `load_model`."""
    uri = f"models:/{name}/{version}"
    with (
        registry_client(tracking_uri) as client,
        tempfile.TemporaryDirectory(prefix="inpaint-model-") as folder,
    ):
        found = find_version(client, uri)
        try:
            download_artifact(found, "MLmodel", folder)
            mlmodel = ModelFile.load(folder)
        except (OSError, KeyError, TypeError, AttributeError, ValueError, yaml.YAMLError) as error:
            raise RegistryError(f"the MLmodel of {uri} cannot be read: {_short_message(error)}") from error
    info = _version_info(mlmodel, uri)
    return VersionFacts(name, version, info, _hole_checker(info))


def _version_info(mlmodel: ModelFile, uri: str) -> CheckpointInfo:
    record = mlmodel.metadata or {}  # `model` is the model's name; `name` may be a key of the user's
    try:
        return CheckpointInfo.from_record(
            {**record, "name": record.get("model", "")}, f"the MLmodel of {uri}"
        )
    except RecordError as error:
        raise RegistryError(str(error)) from None


def load_program(version: ModelVersion, folder: str, device: str = "cpu") -> tuple[ModelFile, Any]:
    """Download a version to `folder` and load its program; returns the MLmodel and the program.

    Call inside `registry_client` and `safe_loading`. RegistryError, before anything is loaded: the files hold or name
    more than an exported program.
    """
    for path in ("MLmodel", "data"):  # not the checkpoint, which would double the download
        download_artifact(version, path, folder)
    try:
        mlmodel = ModelFile.load(folder)
        flavor = mlmodel.flavors["pytorch"]
        if flavor.get("code") or flavor.get("model_data") != "data":  # MLflow would import from there
            raise ValueError("its MLmodel names code or files of its own")
        if extra_files := sorted({file.name for file in Path(folder, "data").iterdir()} - {PROGRAM_FILE}):
            raise ValueError(f"it holds {extra_files[0]}: a pickled model, or code")
        sanitize_program(Path(folder, "data", PROGRAM_FILE))
    except (ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError, FileNotFoundError) as error:
        raise RegistryError(
            f"{version.name} version {version.version} is refused, as it is not just an exported program: "
            f"{_short_message(error)}"
        ) from error
    return mlmodel, mlflow.pytorch.load_model(folder, device=device)


def _load_checkpoint(folder: Path, device: str) -> LoadedModel:
    for name in (WEIGHTS_FILE, INFO_FILE):
        if not (folder / name).is_file():
            registered = (
                f"; models:/{folder} means the registered model"
                if VERSION_PATTERN.fullmatch(str(folder))
                else ""
            )
            raise RegistryError(f"{folder} is not a checkpoint folder: it has no {name}{registered}")
    try:
        model, info = load_weights(folder)
    except (OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise RegistryError(f"the checkpoint {folder} cannot be loaded: {_short_message(error)}") from error
    info = replace(
        info,
        model=model.name,
        needs_edges=model.needs_edges,
        takes_edges=model.takes_edges,
        true_edges=model.uses_true_edges,
    )
    module = model.frozen_completion().to(device).eval()
    return LoadedModel(module, model.name, None, info, model.check_hole, device)


def _hole_checker(info: CheckpointInfo) -> Callable[[Tensor], None] | None:
    """The model's `check_hole`, built on the meta device without weights; None if the model accepts every hole."""
    try:
        if model_class(info.name).check_hole is Model.check_hole:
            return None
        with torch.device("meta"):
            model: Model = build_model(info.name, **model_options(info.name, info.options))
    except (KeyError, TypeError, ValueError) as error:  # registered by another release
        logging.getLogger(__name__).warning("holes are not checked beforehand: %s", _short_message(error))
        return None
    return model.check_hole


@contextmanager
def safe_loading() -> Iterator[None]:
    """Make MLflow and torch unpickle only tensors and run no code that comes with a model."""
    with set_environment(SAFE_ENVIRONMENT):
        yield


def _short_message(error: BaseException) -> str:
    return error_text(error)[:300]
