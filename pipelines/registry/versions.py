"""Reaching the MLflow registry and finding a version in it, with errors in one line."""

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

from pipelines.tracking import shown

CANDIDATE, CHAMPION = "candidate", "champion"
NAME = re.compile(r"[A-Za-z0-9_.-]+")
URI = re.compile(rf"models:/({NAME.pattern})(?:@({NAME.pattern})|/(\d+))")
QUIET = {
    "mlflow": logging.ERROR,
    "alembic": logging.ERROR,
    "mlflow.store.db.utils": logging.CRITICAL,  # prints the errors that it raises, with their tracebacks
}
CHECKPOINT = "checkpoint"  # the folder in a version's files that its model is built again from
FORMS = "write models:/NAME@ALIAS, models:/NAME/VERSION or a checkpoint folder"


class RegistryError(ValueError):
    """What is not in the registry, or why it cannot be reached; one line with the mend."""


@contextmanager
def connected(tracking_uri: str | None = None, patient: bool = False) -> Iterator[MlflowClient]:
    """A client of the MLflow at `tracking_uri` (None: MLflow's current one); its errors become RegistryError.

    MLflow resolves models:/ through process-wide settings: they are set for the block and put back. A person who
    looks something up is not kept waiting for minutes by a server that is away; `patient` keeps MLflow's retries.
    """
    uri = tracking_uri or mlflow.get_tracking_uri()
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
        raise RegistryError(
            f"there is no MLflow registry at {uri}: set MLFLOW_TRACKING_URI to the one that holds the model"
        )
    for logger, level in QUIET.items():
        logging.getLogger(logger).setLevel(level)
    settings = {"MLFLOW_TRACKING_URI": os.environ.get("MLFLOW_TRACKING_URI")}
    before = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else None
    if before == settings["MLFLOW_TRACKING_URI"]:
        before = None  # it comes from the environment, and shall follow it
    hurry = {"MAX_RETRIES": "2", "BACKOFF_FACTOR": "1", "TIMEOUT": "30"}
    wanted = {} if patient else {f"MLFLOW_HTTP_REQUEST_{key}": value for key, value in hurry.items()}
    for key, value in {**wanted, "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"}.items():
        settings[key] = os.environ.get(key)
        os.environ.setdefault(key, value)
    mlflow.set_tracking_uri(uri)
    registry = mlflow.get_registry_uri()  # the same, unless somebody has set it apart
    apart = tracking_uri is not None and registry != uri
    try:
        if apart:
            mlflow.set_registry_uri(uri)
        yield MlflowClient(uri, registry_uri=uri if apart else registry)
    except MlflowException as error:
        raise RegistryError(_said(error, uri)) from error
    except Exception as error:
        if type(error).__module__.startswith("sqlalchemy."):  # of a file that MLflow cannot even open
            raise RegistryError(_said(error, uri)) from error
        raise
    finally:
        if apart:
            mlflow.set_registry_uri(registry)
        mlflow.set_tracking_uri(before)  # type: ignore[arg-type]  # None: unset
        for key, old in settings.items():
            if old is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = old


def find_model(client: MlflowClient, name: str) -> RegisteredModel:
    """The registered model; RegistryError naming those there are."""
    try:
        return client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
    known = sorted(model.name for model in pages(client.search_registered_models))
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = (
        f"did you mean {near[0]!r}?"
        if near
        else f"it has {', '.join(known) or 'none yet: inpaint run makes one'}"
    )
    raise RegistryError(f"the registry has no model {name!r}: {hint}") from None


def find_version(client: MlflowClient, uri: str) -> ModelVersion:
    """The version that models:/NAME@ALIAS or models:/NAME/VERSION names; RegistryError naming those there are."""
    match = URI.fullmatch(uri)
    if not match:
        raise RegistryError(f"{uri!r} names no model version: {FORMS}")
    name, alias, number = match.groups()
    if alias:
        model = find_model(client, name)
        if alias not in model.aliases:
            known = (
                ", ".join(f"{key} (version {value})" for key, value in sorted(model.aliases.items()))
                or "none"
            )
            raise RegistryError(f"{name} has no alias {alias!r}; its aliases: {known}")
        number = str(model.aliases[alias])
    try:
        return client.get_model_version(name, number)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
    find_model(client, name)  # says so when there is not even the model
    numbers = sorted(int(found.version) for found in versions_of(client, name))
    shown = ", ".join(map(str, numbers)) if len(numbers) <= 10 else f"{numbers[0]} to {numbers[-1]}"
    raise RegistryError(f"{name} has no version {number}; its versions: {shown or 'none'}") from None


def versions_of(client: MlflowClient, name: str | None = None, also: str = "") -> list[ModelVersion]:
    """Every version of a model, or of all, first ones first; `also` narrows it in MLflow's words ("tags.sigma = '2'")."""
    wanted = " and ".join(part for part in (f"name = '{name}'" if name else "", also) if part)
    found = pages(client.search_model_versions, filter_string=wanted or None)
    return sorted(found, key=lambda version: (version.name, int(version.version)))


def fetch(version: ModelVersion, part: str, folder: str | Path) -> Path:
    """A file or folder of a version's files, in `folder`; raises what MLflow does when there is none. Within `connected`."""
    uri = f"models:/{version.name}/{version.version}/{part}"
    return Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(folder)))


def pages(search: Callable[..., Any], **arguments: Any) -> list[Any]:
    """All pages of one of the client's searches."""
    found = search(**arguments)
    rows = list(found)
    while found.token:
        found = search(**arguments, page_token=found.token)
        rows += found
    return rows


def version_uri(text: str, alias: str = CHAMPION) -> str:
    """NAME@ALIAS, NAME/VERSION or NAME (its champion), with or without models:/ before it, as a models:/ URI."""
    name = text.removeprefix("models:/")
    return f"models:/{name}" if "@" in name or "/" in name else f"models:/{name}@{alias}"


def when(milliseconds: int | None) -> str:
    """A time of MLflow's, in UTC."""
    return datetime.fromtimestamp((milliseconds or 0) / 1000, UTC).isoformat(timespec="seconds")


def who_am_i() -> str:
    """Who is told to have done something: MLflow's user name, or user@host where there is none."""
    if named := os.environ.get("MLFLOW_TRACKING_USERNAME"):
        return named
    try:
        return f"{getpass.getuser()}@{socket.gethostname()}"
    except (KeyError, OSError):  # a container without a user entry
        return socket.gethostname()


def _said(error: Exception, uri: str) -> str:
    text = " ".join(str(error).split())
    code = getattr(error, "error_code", "")
    place = shown(uri)
    user = os.environ.get("MLFLOW_TRACKING_USERNAME")
    if "HTTPConnectionPool" in text or "Max retries" in text or "Connection refused" in text:
        return (
            f"the MLflow server at {place} does not answer: start it, or set MLFLOW_TRACKING_URI to another"
        )
    if code == "UNAUTHENTICATED":
        if user:
            return f"the MLflow server at {place} does not know {user!r} with this password: see MLFLOW_TRACKING_PASSWORD"
        return (
            f"the MLflow server at {place} refuses: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
    if code == "PERMISSION_DENIED":
        return f"{user or 'this user'} may not do that in the MLflow at {place}: ask its administrator for the permission"
    if "readonly database" in text or "unable to open database file" in text:
        doing = "write" if "readonly" in text else "open"
        return f"this user may not {doing} MLflow's database {place}: ask for write permission on the file and its folder"
    if "database is locked" in text:
        return f"MLflow's database {place} is busy with somebody else's work: try again"
    return f"MLflow at {place}: {text[:400]}"
