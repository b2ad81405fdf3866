"""The registered versions as the Try page needs them: from the cached registry, and each one's MLmodel file."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from fastapi import HTTPException

from pipelines.studio.imports import import_alone

if TYPE_CHECKING:
    from pipelines.registry.loaded_model import VersionFacts
    from pipelines.studio.registry_snapshot import VersionSummary
    from pipelines.studio.state import Studio

MAX_CACHED = 500

_facts: dict[tuple[str, str, str], VersionFacts] = {}
_lock = threading.Lock()


def find_summary(studio: Studio, version_id: str) -> VersionSummary:
    """The version that NAME/VERSION names, looked up among the registered ones, or 404."""
    summary = studio.registry.get().find(version_id)
    if summary is None:
        raise HTTPException(
            404, f"the registry has no version {version_id[:80]}: it may have been deleted; reload"
        )
    return summary


def version_facts(studio: Studio, summary: VersionSummary) -> VersionFacts:
    """What the version's MLmodel file records; it does not change, and is read once. Takes seconds the first time."""
    import_alone("pipelines.registry.load")
    from pipelines.registry.load import read_facts
    from pipelines.studio.registry_snapshot import REGISTRY_LOCK

    key = (summary.name, summary.version, summary.created)
    with _lock:
        facts = _facts.get(key)
    if facts is None:
        with REGISTRY_LOCK:
            facts = read_facts(summary.name, summary.version, tracking_uri=studio.settings.tracking_uri)
        with _lock:
            while len(_facts) >= MAX_CACHED:
                del _facts[next(iter(_facts))]
            _facts[key] = facts
    return facts


def summary_json(summary: VersionSummary) -> dict[str, Any]:
    return {
        "id": f"{summary.name}/{summary.version}",
        "name": summary.name,
        "version": summary.version,
        "aliases": list(summary.aliases),
        "model": summary.model,
        "size": summary.size,
        "sigma": summary.sigma,
        "created": summary.created,
    }


def details_json(summary: VersionSummary, facts: VersionFacts) -> dict[str, Any]:
    """`hole_range` are fractions of the training crops; `masks` the names of the kinds of training masks."""
    hole_range = facts.info.hole_range
    return summary_json(summary) | {
        "takes_edges": facts.takes_edges,
        "needs_edges": facts.needs_edges,
        "hole_range": [float(end) for end in hole_range] if hole_range else None,
        "masks": sorted(facts.info.masks or {}),
        "sigma": facts.sigma,
        "size": facts.size,
    }
