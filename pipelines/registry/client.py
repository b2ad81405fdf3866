"""A client for the MLflow registry, and look-ups of models and versions, with one-line errors."""

from __future__ import annotations

import difflib
import getpass
import logging
import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import mlflow
import mlflow.artifacts
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.exceptions import MlflowException

from data_prep.network import bypass_proxy_for_loopback
from data_prep.uris import UriError, normalize_tracking_uri, path_from_sqlite_url
from pipelines.names import MODEL_NAME
from pipelines.tracking.moved_storage import relocate_if_moved
from pipelines.tracking.server import TrackingError, check_server, explain_mlflow_error

CANDIDATE, CHAMPION = "candidate", "champion"
VERSION_PATTERN = re.compile(rf"(?:models:/)?({MODEL_NAME.pattern})(?:@({MODEL_NAME.pattern})|/(\d+))?")
LOG_LEVELS = {
    "mlflow": logging.ERROR,
    "alembic": logging.ERROR,
    "mlflow.store.db.utils": logging.CRITICAL,  # logs the errors that it raises, with tracebacks
}
CHECKPOINT_FOLDER = "checkpoint"  # in a version's files; the whole model is rebuilt from it
MODEL_HINT = "write NAME, NAME@ALIAS, NAME/VERSION or a checkpoint folder"


class RegistryError(ValueError):
    """Something is not in the registry, or the registry cannot be reached: one line that says what to do."""


class NotRegistered(RegistryError):
    """There is no registry, or no model of this name in it."""


@contextmanager
def registry_client(tracking_uri: str | None = None, keep_retries: bool = False) -> Iterator[MlflowClient]:
    """A client for MLflow at `tracking_uri` (None: the current URI); MLflow's errors become RegistryError.

    MLflow resolves models:/ through process-wide settings: they are set inside the block and restored after it. HTTP
    requests are retried for seconds only, so that a look-up on an unreachable server fails soon; `keep_retries` keeps
    MLflow's own retries, which take minutes.
    """
    uri = tracking_uri or mlflow.get_tracking_uri()
    try:
        uri = normalize_tracking_uri(uri)
        if (path := path_from_sqlite_url(uri)) and not path.exists():
            raise NotRegistered(
                f"there is no MLflow registry at {uri}: set MLFLOW_TRACKING_URI to the one that holds the model"
            )
        relocate_if_moved(uri)
        if not keep_retries:
            check_server(uri)
    except (UriError, TrackingError) as error:
        raise RegistryError(str(error)) from None
    bypass_proxy_for_loopback(uri)
    for logger, level in LOG_LEVELS.items():
        logging.getLogger(logger).setLevel(level)
    settings = {"MLFLOW_TRACKING_URI": os.environ.get("MLFLOW_TRACKING_URI")}
    previous_uri = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else None
    if previous_uri == settings["MLFLOW_TRACKING_URI"]:
        previous_uri = None  # from the environment, whose later changes it follows if it is unset
    few_retries = {"MAX_RETRIES": "2", "BACKOFF_FACTOR": "1", "TIMEOUT": "30"}
    http = {} if keep_retries else {f"MLFLOW_HTTP_REQUEST_{key}": value for key, value in few_retries.items()}
    for key, value in {**http, "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"}.items():
        settings[key] = os.environ.get(key)
        os.environ.setdefault(key, value)
    mlflow.set_tracking_uri(uri)
    registry_uri = mlflow.get_registry_uri()  # equals the tracking URI unless it was set separately
    override = tracking_uri is not None and registry_uri != uri
    try:
        if override:
            mlflow.set_registry_uri(uri)
        yield MlflowClient(uri, registry_uri=uri if override else registry_uri)
    except MlflowException as error:
        raise RegistryError(explain_mlflow_error(error, uri)) from error
    except Exception as error:
        if type(error).__module__.startswith(("sqlalchemy.", "alembic.")):  # MLflow cannot open the file
            raise RegistryError(explain_mlflow_error(error, uri)) from error
        raise
    finally:
        if override:
            mlflow.set_registry_uri(registry_uri)
        mlflow.set_tracking_uri(previous_uri)  # type: ignore[arg-type]  # None: unset
        for key, previous in settings.items():
            if previous is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = previous


def find_model(client: MlflowClient, name: str) -> RegisteredModel:
    """The registered model. NotRegistered: there is none of this name; the message lists the existing ones."""
    try:
        return client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
    known = sorted(model.name for model in all_pages(client.search_registered_models))
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = (
        f"did you mean {matches[0]!r}?"
        if matches
        else f"it has {', '.join(known) or 'none yet: inpaint run makes one'}"
    )
    raise NotRegistered(f"the registry has no model {name!r}: {hint}") from None


def find_folder(model: str | Path) -> Path | None:
    """The existing folder that a model argument names; None: it names a registered model.

    A folder comes first: `edge_connect` is the folder edge_connect if there is one; models:/edge_connect never is.
    """
    text = str(model)
    return Path(text) if not text.startswith("models:") and os.path.isdir(text) else None


def find_version(client: MlflowClient, model: str) -> ModelVersion:
    """The version that NAME@ALIAS, NAME/VERSION or NAME (its champion, else its newest) names; models:/ is optional.

    RegistryError: there is no such model, alias or version; the message lists the existing ones.
    """
    match = VERSION_PATTERN.fullmatch(model)
    if not match:
        raise RegistryError(f"{model!r} names no model version: {MODEL_HINT}")
    name, alias, number = match.groups()
    if alias or not number:
        return _find_by_alias(client, name, alias)
    try:
        return client.get_model_version(name, number)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
    find_model(client, name)  # raises if there is no such model either
    numbers = sorted(int(version.version) for version in list_versions(client, name))
    versions = ", ".join(map(str, numbers)) if len(numbers) <= 10 else f"{numbers[0]} to {numbers[-1]}"
    raise RegistryError(f"{name} has no version {number}; its versions: {versions or 'none'}") from None


def _find_by_alias(client: MlflowClient, name: str, alias: str | None) -> ModelVersion:
    """The version with this alias; None: the champion, else the newest version."""
    model = find_model(client, name)
    if alias or CHAMPION in model.aliases:
        alias = alias or CHAMPION
        if alias not in model.aliases:
            known = (
                ", ".join(f"{key} (version {value})" for key, value in sorted(model.aliases.items()))
                or "none"
            )
            raise RegistryError(f"{name} has no alias {alias!r}; its aliases: {known}")
        return client.get_model_version(name, str(model.aliases[alias]))
    versions = list_versions(client, name)
    if not versions:
        raise RegistryError(f"{name} has no version yet: `inpaint run` registers one")
    return versions[-1]


def list_versions(
    client: MlflowClient, name: str | None = None, filter_string: str = ""
) -> list[ModelVersion]:
    """The versions of a model, or of all models (`name` None), by name and number.

    filter_string: a further condition in MLflow's syntax, such as "tags.sigma = '2'".
    """
    conditions = [part for part in (f"name = '{name}'" if name else "", filter_string) if part]
    versions = all_pages(client.search_model_versions, filter_string=" and ".join(conditions) or None)
    return sorted(versions, key=lambda version: (version.name, int(version.version)))


def delete(name: str, version: str, tracking_uri: str | None = None) -> None:
    """Remove a version from the registry; its run keeps the files.

    RegistryError: there is no such version, or it has an alias.
    """
    with registry_client(tracking_uri) as client:
        find_version(client, f"models:/{name}/{version}")
        aliases = find_model(client, name).aliases
        own_aliases = [alias for alias, number in aliases.items() if str(number) == version]
        if own_aliases:
            raise RegistryError(
                f"{name} version {version} is {' and '.join(sorted(own_aliases))}: "
                "give the alias to another version first"
            )
        client.delete_model_version(name, version)


def list_models(tracking_uri: str | None = None) -> list[dict[str, Any]]:
    """One row per registered model: name, model, versions, champion, candidate, updated."""
    with registry_client(tracking_uri) as client:
        models = all_pages(client.search_registered_models)
        versions: dict[str, list[ModelVersion]] = {model.name: [] for model in models}
        for version in list_versions(client):
            versions.setdefault(version.name, []).append(version)
        return [
            {
                "name": model.name,
                "model": versions[model.name][-1].tags.get("model", "") if versions[model.name] else "",
                "versions": len(versions[model.name]),
                "champion": model.aliases.get(CHAMPION) and str(model.aliases[CHAMPION]),
                "candidate": model.aliases.get(CANDIDATE) and str(model.aliases[CANDIDATE]),
                "updated": utc_time(model.last_updated_timestamp),
            }
            for model in models
        ]


def download_artifact(version: ModelVersion, path: str, folder: str | Path) -> Path:
    """Download a file or folder of a version to `folder`; returns its local path.

    Call inside `registry_client`. Raises MLflow's error if the version has no such file.
    """
    uri = f"models:/{version.name}/{version.version}/{path}"
    return Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(folder)))


def all_pages(search: Callable[..., Any], **arguments: Any) -> list[Any]:
    """The results of all pages of one of MlflowClient's search methods."""
    page = search(**arguments)
    results = list(page)
    while page.token:
        page = search(**arguments, page_token=page.token)
        results += page
    return results


def utc_time(milliseconds: int | None) -> str:
    """One of MLflow's timestamps as ISO 8601 in UTC."""
    return datetime.fromtimestamp((milliseconds or 0) / 1000, UTC).isoformat(timespec="seconds")


def current_user() -> str:
    """The user recorded in the history: MLflow's user name, else user@host."""
    if username := os.environ.get("MLFLOW_TRACKING_USERNAME"):
        return username
    try:
        return f"{getpass.getuser()}@{socket.gethostname()}"
    except (KeyError, OSError):  # a container without a user entry
        return socket.gethostname()
