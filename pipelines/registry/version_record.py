"""The provenance of a version, stored in its MLmodel file (`metadata`): data, recipe, code, and evaluation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pipelines.evaluation.protocol import Protocol, short_digest
from pipelines.registry.searching import DISTANCE_TAG, FEATURES_TAG, PROTOCOL_TAG


@dataclass(frozen=True)
class ScoredOn:
    """The photographs that a version was scored on."""

    shards: str
    """URI of the folder of shards."""
    digest: str
    """Digest of the shards."""
    split: str
    count: int | None
    """Maximum number of photographs; None: all."""
    size: int
    """Side in pixels."""

    @classmethod
    def from_record(cls, record: Mapping[str, Any] | None) -> ScoredOn | None:
        """Decode a version's `scored_on`; None: not on record."""
        if not record:
            return None
        return cls(record["shards"], record["digest"], record["split"], record["count"], record["size"])


@dataclass(frozen=True)
class VersionRecord:
    """The provenance of a version. Its metadata also holds the model's CheckpointInfo (options, sigma, steps ...)."""

    recipe: str
    """As YAML."""
    shards: str
    """Digest of the training photographs."""
    edges: dict[str, str]
    """sigma -> digest of the edges; empty if they were computed during training."""
    scored_on: ScoredOn
    protocol: Protocol
    photographs: dict[str, dict[str, int]]
    """masks -> hole-area band -> number of photographs."""
    metric: str
    """The metric that decides which version becomes champion."""
    training_run: str
    sweep: dict[str, Any] | None
    """name, run and values of the sweep that the options come from."""
    code: dict[str, str]
    packages: dict[str, str]
    ray: dict[str, Any]
    samples: tuple[str, ...] = ()
    """Artifact paths of the run's sample grids."""
    card_picture: str = ""
    """Artifact path of the picture in the model card."""
    source: str = ""
    """Address of the photographs."""
    splits: dict[str, int] = field(default_factory=dict)
    """split -> number of photographs in the shards."""
    baselines: dict[str, dict[str, float]] = field(default_factory=dict)
    """Untrained method -> `masks/metric` -> score on the same photographs."""
    intervals: dict[str, list[float]] = field(default_factory=dict)
    """`masks/metric` -> ends of the 95 % interval of its mean."""
    worse: dict[str, list[str]] = field(default_factory=dict)
    """Untrained method, or '' for this version -> `masks/metric`s whose mean is worse than the best of them by more than
    chance."""
    verdict: str = ""
    """A sentence that compares the version with the best untrained method."""

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> VersionRecord:
        """Decode a record. KeyError, TypeError: a field is missing or unknown."""
        nested = {
            "scored_on": ScoredOn(**record["scored_on"]),
            "protocol": Protocol.from_record(record["protocol"]),
            "samples": tuple(record.get("samples", ())),
        }
        return cls(**{**record, **nested})

    @property
    def tags(self) -> dict[str, str]:
        """The tags to search versions by and to tell them apart."""
        changed = "-dirty" if self.code.get("dirty") == "true" else ""
        tags = {
            "inpaint.commit": self.code.get("commit", "")[:12] + changed,
            "inpaint.shards": self.shards,
            "inpaint.edges": ", ".join(self.edges.values()),
            "inpaint.sweep": (self.sweep or {}).get("name", ""),
            **protocol_tags(self.protocol),
            **self.protocol.digest_tags,
        }
        return {key: value for key, value in tags.items() if value}

    def as_json(self) -> dict[str, Any]:
        """The record as it is stored."""
        return vars(self) | {
            "scored_on": asdict(self.scored_on),
            "protocol": self.protocol.to_dict(),
            "samples": list(self.samples),
        }


def protocol_tags(protocol: Protocol) -> dict[str, str]:
    """The tags that group versions with comparable scores, with comparable distances (fd, kid), and with the same weights
    of the networks of published scores (LPIPS, FID)."""
    sizes, masks = " and ".join(protocol.sizes), " and ".join(protocol.masks)
    tags = {
        PROTOCOL_TAG: f"{protocol.digest}: {protocol.photographs} photographs of {sizes}, {masks} masks, "
        f"seed {protocol.seed}"
    }
    if protocol.distance:
        tags[DISTANCE_TAG] = f"{short_digest(protocol.distance)}: {protocol.distance['name']}"
    if protocol.features:
        tags[FEATURES_TAG] = json.dumps(protocol.features, sort_keys=True)
    return tags
