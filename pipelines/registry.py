"""Model versions in the MLflow registry: made exactly once, crowned, taken back, looked up and loaded.

What had an alias when, and why, is an append-only history in tags of the registered model.
"""

from __future__ import annotations

import getpass
import json
import os
import socket
from datetime import UTC, datetime
from typing import Any

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion

from pipelines.exporting import export, register
from pipelines.loading import LoadedModel, load_model
from pipelines.versions import (
    CANDIDATE,
    CHAMPION,
    RegistryError,
    connected,
    find_model,
    find_version,
    pages,
    versions_of,
)

__all__ = [
    "LoadedModel",
    "RegistryError",
    "crown",
    "current_champion",
    "export",
    "history",
    "list_models",
    "load_model",
    "promote",
    "register",
    "rollback",
    "show",
    "still_registered",
]

EVENT = "history."  # + time: one tag an event, never changed


def still_registered(name: str, version: str, step_key: str, tracking_uri: str | None = None) -> bool:
    """Whether a finished step's version is still there: versions can be deleted by hand."""
    try:
        with connected(tracking_uri) as client:
            return find_version(client, f"models:/{name}/{version}").tags.get("step_key") == step_key
    except RegistryError:
        return False


def current_champion(name: str, tracking_uri: str | None = None) -> str | None:
    """The version under the alias `champion`; None when there is none, or no such model yet."""
    with connected(tracking_uri) as client:
        known = [
            model.name for model in pages(client.search_registered_models, filter_string=f"name = '{name}'")
        ]
        return _holder(client, name, CHAMPION) if name in known else None


def crown(
    name: str,
    version: str,
    better: bool,
    reason: str,
    *,
    score: float | None = None,
    tracking_uri: str | None = None,
) -> bool:
    """Make `version` champion when it is `better`, else note in its tags why not; says whether it is champion.

    `reason` is the comparison in a few words: "psnr_rgb_hole 24.1 against 23.6 of version 3".
    """
    if better:
        promote(name, version, CHAMPION, reason=reason, score=score, tracking_uri=tracking_uri)
        return True
    with connected(tracking_uri) as client:
        client.set_model_version_tag(name, version, "not_champion", reason)
    return False


def promote(
    name: str,
    version: str,
    alias: str = CHAMPION,
    *,
    reason: str = "by hand",
    score: float | None = None,
    tracking_uri: str | None = None,
) -> str | None:
    """Set `alias` on `version`, recorded with who, when and why; returns the version that had it before, or None.

    Repeated, it adds nothing. RegistryError: no such version.
    """
    with connected(tracking_uri) as client:
        find_version(client, f"models:/{name}/{version}")
        before = _holder(client, name, alias)
        if before != str(version):
            _move(client, name, alias, "promote", before, str(version), reason, score)
        return before


def rollback(
    name: str, alias: str = CHAMPION, *, reason: str = "by hand", tracking_uri: str | None = None
) -> str:
    """Set `alias` back on the version that had it before, by the recorded history; returns that version.

    A second rollback goes one further back. RegistryError: there is none, or it was deleted.
    """
    with connected(tracking_uri) as client:
        now = _holder(client, name, alias)
        held = _held([event for event in _events(client, name) if event["alias"] == alias])
        if now is None or len(held) < 2 or held[-1] != now:
            raise RegistryError(
                f"{name} has no earlier {alias} on record to go back to: see inpaint models show {name}"
            )
        find_version(client, f"models:/{name}/{held[-2]}")
        _move(client, name, alias, "rollback", now, held[-2], reason, None)
        return held[-2]


def history(name: str, tracking_uri: str | None = None) -> list[dict[str, Any]]:
    """Every move of an alias, oldest first: alias, action, to, from, when, who, reason, score."""
    with connected(tracking_uri) as client:
        return _events(client, name)


def list_models(tracking_uri: str | None = None) -> list[dict[str, Any]]:
    """One row a registered model: name, model, versions, champion, candidate, updated."""
    with connected(tracking_uri) as client:
        rows = []
        for found in pages(client.search_registered_models):
            versions = versions_of(client, found.name)
            rows.append(
                {
                    "name": found.name,
                    "model": versions[-1].tags.get("model", "") if versions else "",
                    "versions": len(versions),
                    "champion": _text(found.aliases.get(CHAMPION)),
                    "candidate": _text(found.aliases.get(CANDIDATE)),
                    "updated": _when(found.last_updated_timestamp),
                }
            )
        return rows


def show(uri: str, tracking_uri: str | None = None) -> dict[str, Any]:
    """A version (models:/NAME@ALIAS, models:/NAME/VERSION), or for a plain NAME the model with all its versions."""
    with connected(tracking_uri) as client:
        if uri.startswith("models:"):
            version = find_version(client, uri)
            return {
                **_row(version, find_model(client, version.name).aliases),
                "metrics": _metrics(client, version),
                "history": [
                    event for event in _events(client, version.name) if str(version.version) in event.values()
                ],
            }
        model = find_model(client, uri)
        return {
            "name": model.name,
            "aliases": {alias: str(version) for alias, version in sorted(model.aliases.items())},
            "versions": [_row(version, model.aliases) for version in versions_of(client, uri)][::-1],
            "history": _events(client, uri),
        }


def _row(version: ModelVersion, aliases: dict[str, str]) -> dict[str, Any]:
    number = str(version.version)
    return {
        "name": version.name,
        "version": number,
        "aliases": sorted(alias for alias, holder in aliases.items() if str(holder) == number),
        "created": _when(version.creation_timestamp),
        "run_id": version.run_id,
        "tags": dict(sorted(version.tags.items())),
    }


def _metrics(client: MlflowClient, version: ModelVersion) -> dict[str, float]:
    logged = client.get_logged_model(str(version.source).rpartition("/")[2])
    return {
        metric.key: metric.value for metric in sorted(logged.metrics or [], key=lambda metric: metric.key)
    }


def _holder(client: MlflowClient, name: str, alias: str) -> str | None:
    return _text(find_model(client, name).aliases.get(alias))


def _events(client: MlflowClient, name: str) -> list[dict[str, Any]]:
    tags = find_model(client, name).tags
    return [json.loads(tags[key]) for key in sorted(tags) if key.startswith(EVENT)]


def _held(events: list[dict[str, Any]]) -> list[str]:
    """The versions that had the alias, the present one last, each with what preceded it before it."""
    held: list[str] = []
    for event in events:
        before = event["from"]
        if held[-1:] != [before]:  # the last event never came true, or the alias was moved without us
            held = held[: held.index(before) + 1] if before in held else [before] if before else []
        held = held[:-1] if event["action"] == "rollback" else [*held, event["to"]]
    return held


def _move(
    client: MlflowClient,
    name: str,
    alias: str,
    action: str,
    before: str | None,
    version: str,
    reason: str,
    score: float | None,
) -> None:
    """Record the event, then move the alias. Died in between, the repetition finds its event and only moves."""
    past = [event for event in _events(client, name) if event["alias"] == alias]
    move = {"alias": alias, "action": action, "to": version, "from": before}
    if not past or any(past[-1][key] != value for key, value in move.items()):
        now = datetime.now(UTC)
        user = os.environ.get("MLFLOW_TRACKING_USERNAME") or _user()
        event = {
            **move,
            "when": now.isoformat(timespec="seconds"),
            "who": user,
            "reason": reason,
            "score": score,
        }
        client.set_registered_model_tag(name, f"{EVENT}{now:%Y%m%dT%H%M%S.%f}", json.dumps(event))
    client.set_registered_model_alias(name, alias, version)


def _user() -> str:
    try:
        return f"{getpass.getuser()}@{socket.gethostname()}"
    except (KeyError, OSError):  # a container without a user entry
        return socket.gethostname()


def _text(version: str | int | None) -> str | None:
    return None if version is None else str(version)


def _when(milliseconds: int | None) -> str:
    return datetime.fromtimestamp((milliseconds or 0) / 1000, UTC).isoformat(timespec="seconds")
