"""The registry as the studio's pages show it: every model and version with its aliases and scores, read at once.

Two searches return everything but the files of versions: models with their aliases and history, and versions with their
scores in a tag. Versions of release 0.1.0 have no such tag: their scores take two more searches.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from mlflow.entities.model_registry import ModelVersion, RegisteredModel

from pipelines.evaluation.protocol import MASKS_TAG, PHOTOGRAPHS_TAG
from pipelines.registry.alias_moves import REJECTED_TAG, AliasMove, Rejection, full_history
from pipelines.registry.client import (
    CANDIDATE,
    CHAMPION,
    NotRegistered,
    all_pages,
    list_versions,
    registry_client,
    utc_time,
)
from pipelines.registry.searching import (
    DEFAULT_METRIC,
    DISTANCE_TAG,
    FEATURES_TAG,
    PROTOCOL_TAG,
    SCORES_TAG,
    logged_model_id,
    logged_scores,
    split_column,
    version_scores,
)

REGISTRY_LOCK = threading.RLock()
"""Held by every use of `registry_client` in the studio's process: it sets process-wide settings of MLflow and restores
them, so two uses at a time would restore each other's."""


@dataclass(frozen=True)
class VersionSummary:
    """One version; '' or None: not on record."""

    name: str
    version: str
    aliases: tuple[str, ...]
    created: str
    """UTC, ISO 8601."""
    run_id: str | None
    logged_model: str
    """Id of the MLflow logged model."""
    model: str
    """The paper's model, such as edge_connect."""
    size: int | None
    """Side of the training crops in pixels."""
    sigma: float | None
    recipe: str
    commit: str
    metric: str
    """The metric that decides which version becomes champion."""
    tags: Mapping[str, str]
    """Without the tag that holds the scores."""
    scores: Mapping[str, float]
    """masks/band/metric -> mean, and masks/metric -> mean over all photographs."""
    protocol: str
    distance: str
    features: str
    photographs_digest: str
    masks_digest: str
    rejected: str
    """Why it did not become champion when it was registered."""
    description: str
    """The model card, in Markdown."""

    @property
    def id(self) -> str:
        """NAME/VERSION."""
        return f"{self.name}/{self.version}"

    @property
    def main_column(self) -> str:
        """The column of the main score: the deciding metric over all photographs of the first mask set; '' without."""
        for metric in (self.metric, DEFAULT_METRIC):
            for column in self.scores:
                _, band, name = split_column(column)
                if not band and name == metric:
                    return column
        return ""

    @property
    def main_score(self) -> float | None:
        return self.scores.get(self.main_column)


@dataclass(frozen=True)
class ModelSummary:
    """A registered model and its versions, newest first."""

    name: str
    model: str
    """The paper's model of the newest version."""
    aliases: Mapping[str, str]
    """alias -> version."""
    moves: tuple[AliasMove, ...]
    """Of all aliases, oldest first."""
    rejections: tuple[Rejection, ...]
    """Versions that did not become champion, oldest first."""
    description: str
    """Markdown."""
    updated: str
    """UTC, ISO 8601."""
    versions: tuple[VersionSummary, ...]

    def version(self, number: str) -> VersionSummary | None:
        return self._by_number.get(number)

    def with_alias(self, alias: str) -> VersionSummary | None:
        """The version that has the alias, or None."""
        return self._by_number.get(self.aliases.get(alias, ""))

    @property
    def main_column(self) -> str:
        """The column of the champion's main score, else the newest version's that has one."""
        champion = self.with_alias(CHAMPION)
        versions = ([champion] if champion else []) + list(self.versions)
        return next((version.main_column for version in versions if version.main_column), "")

    @cached_property
    def _by_number(self) -> dict[str, VersionSummary]:
        return {version.version: version for version in self.versions}


@dataclass(frozen=True)
class RegistrySnapshot:
    """All registered models by name."""

    models: tuple[ModelSummary, ...] = field(default_factory=tuple)

    def model(self, name: str) -> ModelSummary | None:
        return self._by_name.get(name)

    def version(self, name: str, number: str) -> VersionSummary | None:
        model = self.model(name)
        return model.version(number) if model else None

    def find(self, version_id: str) -> VersionSummary | None:
        """The version that NAME/VERSION names, or None."""
        name, _, number = version_id.rpartition("/")
        return self.version(name, number)

    @property
    def versions(self) -> list[VersionSummary]:
        """Of all models: by model, champion first, then newest first."""
        return [
            version
            for model in self.models
            for version in sorted(model.versions, key=lambda entry: CHAMPION not in entry.aliases)
        ]

    @cached_property
    def _by_name(self) -> dict[str, ModelSummary]:
        return {model.name: model for model in self.models}


def load_registry(tracking_uri: str | None = None) -> RegistrySnapshot:
    """The registry as it is now; empty if there is no database yet. RegistryError, one line: it cannot be read."""
    try:
        with REGISTRY_LOCK, registry_client(tracking_uri) as client:
            models: list[RegisteredModel] = all_pages(client.search_registered_models, max_results=1000)
            versions = list_versions(client)
            untagged = any(SCORES_TAG not in version.tags for version in versions)
            logged = logged_scores(client) if untagged else {}
    except NotRegistered:  # the first run makes the database
        return RegistrySnapshot()
    by_name: dict[str, list[ModelVersion]] = {model.name: [] for model in models}
    for version in versions:  # by number
        if (
            version.name in by_name
        ):  # one that was registered between the two searches comes with the next load
            by_name[version.name].append(version)
    return RegistrySnapshot(
        tuple(
            _model_summary(model, by_name[model.name], logged)
            for model in sorted(models, key=lambda model: model.name)
        )
    )


def _model_summary(
    model: RegisteredModel, versions: list[ModelVersion], logged: dict[str, dict[str, float]]
) -> ModelSummary:
    aliases = {alias: str(model.aliases[alias]) for alias in sorted(model.aliases, key=_alias_order)}
    own_aliases: dict[str, list[str]] = {}
    for alias, number in aliases.items():
        own_aliases.setdefault(number, []).append(alias)
    summaries = tuple(
        _version_summary(version, tuple(own_aliases.get(str(version.version), ())), logged)
        for version in reversed(versions)
    )
    return ModelSummary(
        name=model.name,
        model=summaries[0].model if summaries else "",
        aliases=aliases,
        moves=tuple(full_history(model.tags)),
        rejections=tuple(
            Rejection(entry.version, entry.created, entry.rejected)
            for entry in reversed(summaries)
            if entry.rejected
        ),
        description=model.description or "",
        updated=utc_time(
            max([model.last_updated_timestamp or 0, *(v.creation_timestamp or 0 for v in versions)])
        ),
        versions=summaries,
    )


def _version_summary(
    version: ModelVersion, aliases: tuple[str, ...], logged: dict[str, dict[str, float]]
) -> VersionSummary:
    tags = version.tags
    return VersionSummary(
        name=version.name,
        version=str(version.version),
        aliases=aliases,
        created=utc_time(version.creation_timestamp),
        run_id=version.run_id or None,
        logged_model=logged_model_id(version),
        model=tags.get("model", ""),
        size=int(size) if (size := tags.get("size", "")).isdigit() else None,
        sigma=_number(tags.get("sigma", "")),
        recipe=tags.get("inpaint.recipe", ""),
        commit=tags.get("inpaint.commit", ""),
        metric=tags.get("inpaint.metric", "").partition(" ")[0] or DEFAULT_METRIC,
        tags={key: text for key, text in sorted(tags.items()) if key != SCORES_TAG},
        scores=version_scores(version, logged),
        protocol=tags.get(PROTOCOL_TAG, ""),
        distance=tags.get(DISTANCE_TAG, ""),
        features=tags.get(FEATURES_TAG, ""),
        photographs_digest=tags.get(PHOTOGRAPHS_TAG, ""),
        masks_digest=tags.get(MASKS_TAG, ""),
        rejected=tags.get(REJECTED_TAG, ""),
        description=version.description or "",
    )


def _alias_order(alias: str) -> tuple[bool, bool, str]:
    """Champion, candidate, then the others by name."""
    return alias != CHAMPION, alias != CANDIDATE, alias


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
