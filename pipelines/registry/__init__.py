"""The MLflow registry of models: looked up, searched, promoted, taken back, loaded.

    from pipelines import registry
    model = registry.load_model("models:/edge_connect@champion")
    frame = registry.search("edge_connect", where=["psnr > 18"])

What had an alias when, and why, is a history in tags of the registered model (aliases.py).
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mlflow.entities.model_registry import ModelVersion

from pipelines.registry import aliases
from pipelines.registry.aliases import Move, Overtaken, Place
from pipelines.registry.searching import best, search
from pipelines.registry.versions import (
    CANDIDATE,
    CHAMPION,
    RegistryError,
    connected,
    find_model,
    find_version,
    pages,
    versions_of,
    when,
)

if TYPE_CHECKING:
    from pipelines.filling.loading import LoadedModel, load_model
    from pipelines.registry.exporting import register
    from pipelines.registry.showing import show

__all__ = [
    "LoadedModel",
    "Overtaken",
    "RegistryError",
    "best",
    "delete",
    "history",
    "list_models",
    "load_model",
    "place",
    "promote",
    "register",
    "rollback",
    "search",
    "show",
]

LATER = {  # these need torch, or files of a version: imported when they are wanted, as looking up shall be quick
    "LoadedModel": "filling.loading",
    "load_model": "filling.loading",
    "register": "registry.exporting",
    "show": "registry.showing",
}


def __getattr__(name: str) -> Any:
    if name in LATER:
        return getattr(importlib.import_module(f"pipelines.{LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def place(name: str, alias: str = CHAMPION, tracking_uri: str | None = None) -> Place:
    """Where an alias is; given to `promote`, the promotion counts only while it is still there."""
    with connected(tracking_uri) as client:
        return aliases.place(client, name, alias)


def promote(
    name: str,
    version: str,
    alias: str = CHAMPION,
    *,
    reason: str = "by hand",
    score: float | None = None,
    comparison: Mapping[str, Any] | None = None,
    forced: bool = False,
    expected: Place | None = None,
    tracking_uri: str | None = None,
) -> str | None:
    """Set `alias` on `version`, recorded with who, when and why; returns the version that had it before, or None.

    Compares nothing: that is `promoting.promote`. Repeated, it adds nothing. RegistryError: no such version, no
    permission. Overtaken: the alias is no longer where it was `expected`, or somebody else moved it in this moment.
    """
    with connected(tracking_uri) as client:
        found = find_version(client, f"models:/{name}/{version}")
        now = aliases.place(client, name, alias)
        if expected is not None and now != expected:
            since = now.moves[len(expected.moves) :]
            if since and since[-1]["to"] != version:
                raise aliases.overtaken(name, version, since[-1])
            if not since:
                raise Overtaken(
                    f"{alias} of {name} was moved from version {expected.holder} to {now.holder} meanwhile, not by inpaint: "
                    "try again"
                )
        number = str(found.version)
        if now.holder == number:
            return number
        more = {"reason": reason, "score": score, "comparison": comparison, "forced": forced}
        kept = {key: value for key, value in more.items() if value or key in ("reason", "score")}
        aliases.move(client, name, alias, "promote", number, now, **kept)
        return now.holder


def rollback(
    name: str, alias: str = CHAMPION, *, reason: str = "by hand", tracking_uri: str | None = None
) -> str:
    """Set `alias` back on the version that had it before, by the recorded history; returns that version.

    A second rollback goes one further back. RegistryError: there is none, or it was deleted.
    """
    with connected(tracking_uri) as client:
        now = aliases.place(client, name, alias)
        if now.holder is None or len(now.held) < 2:
            raise RegistryError(
                f"{name} has no earlier {alias} on record to go back to: see inpaint models history {name}"
            )
        before = now.held[-2]
        find_version(client, f"models:/{name}/{before}")
        aliases.move(client, name, alias, "rollback", before, now, reason=reason, score=None)
        return before


def delete(name: str, version: str, tracking_uri: str | None = None) -> None:
    """Remove a version from the registry; its files stay with its run. RegistryError: none such, or it has an alias."""
    with connected(tracking_uri) as client:
        find_version(client, f"models:/{name}/{version}")
        held = [alias for alias, holder in find_model(client, name).aliases.items() if str(holder) == version]
        if held:
            raise RegistryError(
                f"{name} version {version} is {' and '.join(sorted(held))}: give the alias to another version first"
            )
        client.delete_model_version(name, version)


def history(name: str, tracking_uri: str | None = None) -> list[Move]:
    """Every move of an alias, oldest first: alias, action, to, from, when, who, reason, score, and how it compared."""
    with connected(tracking_uri) as client:
        return aliases.every_move(find_model(client, name).tags)


def list_models(tracking_uri: str | None = None) -> list[dict[str, Any]]:
    """One row a registered model: name, model, versions, champion, candidate, updated."""
    with connected(tracking_uri) as client:
        models = pages(client.search_registered_models)
        versions: dict[str, list[ModelVersion]] = {model.name: [] for model in models}
        for version in versions_of(client):
            versions.setdefault(version.name, []).append(version)
        return [
            {
                "name": model.name,
                "model": versions[model.name][-1].tags.get("model", "") if versions[model.name] else "",
                "versions": len(versions[model.name]),
                "champion": model.aliases.get(CHAMPION) and str(model.aliases[CHAMPION]),
                "candidate": model.aliases.get(CANDIDATE) and str(model.aliases[CANDIDATE]),
                "updated": when(model.last_updated_timestamp),
            }
            for model in models
        ]
