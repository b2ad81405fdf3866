"""The protocol of an evaluation: all that is needed to repeat it and to tell which scores can be compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any


@dataclass(frozen=True)
class Protocol:
    """Photographs, masks and definitions of the scores. Stored with the scores and with every model version."""

    photographs: int
    sizes: tuple[str, ...]
    """WIDTHxHEIGHT in pixels, without duplicates."""
    photographs_sha256: str
    masks: tuple[str, ...]
    masks_sha256: str
    seed: int
    edges: str
    hole_contents: str
    mean: str
    metrics: dict[str, str]
    """Name -> definition."""
    bands: str
    distance: dict[str, Any] | None
    """Features, layer and crops; None: no distance was computed."""
    versions: dict[str, str]
    """Versions of the packages that make masks and scores."""
    true_edges: tuple[str, ...] = ()
    """Methods that get the true edges of the whole photograph, also those in the hole."""
    hole: tuple[str, ...] = ()
    """Pixel values that mean hole in mask folders; empty: white."""

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Protocol:
        """From the record of a model version, which any release may have written: missing fields are empty, unknown
        fields are ignored."""
        values = {field.name: record[field.name] for field in fields(cls) if field.name in record}
        for name in ("sizes", "masks", "true_edges", "hole"):
            values[name] = tuple(values.get(name) or ())
        return replace(EMPTY_PROTOCOL, **values)

    def to_dict(self) -> dict[str, Any]:
        """The stored form."""
        values = {
            key: list(value) if isinstance(value, tuple) else value for key, value in vars(self).items()
        }
        hole = values.pop("hole")
        return values | ({"hole": hole} if hole else {})

    @property
    def digest(self) -> str:
        """Digest of the fields that must be equal for scores to be comparable. Packages and methods may differ;
        distances have their own digest."""
        values = self.to_dict()
        return short_digest({key: values[key] for key in values if key not in IGNORED_IN_DIGEST})

    def comparable_with(self, other: Protocol) -> bool:
        """Whether scores other than distances can be compared."""
        return self.digest == other.digest


IGNORED_IN_DIGEST = ("versions", "true_edges", "distance")
EMPTY_PROTOCOL = Protocol(0, (), "", (), "", 0, "", "", "", {}, "", None, {})


def short_digest(record: Any) -> str:
    """The first 12 hexadecimal digits of the SHA-256 of a record as JSON."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:12]
