"""The protocol of an evaluation: all that is needed to repeat it and to tell which scores can be compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
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
    frozen_masks: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Frozen set among `masks` -> its digest, and the masks, count, size and seed it was made with."""
    features: dict[str, str] | None = None
    """Network of LPIPS, FID, KID, P-IDS and U-IDS -> SHA-256 of its weights; None: none of them was computed."""

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Protocol:
        """From the record of a model version, which any release may have written: missing fields are empty, unknown
        fields are ignored."""
        values = {known.name: record[known.name] for known in fields(cls) if known.name in record}
        for name in ("sizes", "masks", "true_edges", "hole"):
            values[name] = tuple(values.get(name) or ())
        return replace(EMPTY_PROTOCOL, **values)

    def to_dict(self) -> dict[str, Any]:
        """The stored form."""
        values = {
            key: list(value) if isinstance(value, tuple) else value for key, value in vars(self).items()
        }
        optional = {key: values.pop(key) for key in ("hole", "frozen_masks", "features")}
        return values | {key: value for key, value in optional.items() if value}

    @property
    def digest(self) -> str:
        """Digest of the fields that must be equal for scores to be comparable. Packages and methods may differ;
        distances and the scores of published networks have their own."""
        return short_digest(self._compared_values())

    @property
    def short_photographs(self) -> str:
        """The digest of the photographs as texts show it; '' if it is not on record."""
        return self.photographs_sha256[:SHORT_DIGEST]

    @property
    def short_masks(self) -> str:
        """The digest of the masks as texts show it; '' if it is not on record."""
        return self.masks_sha256[:SHORT_DIGEST]

    @property
    def digests(self) -> str:
        """`photographs 1a2b3c4d5e6f, masks 6f5e4d3c2b1a`."""
        return f"photographs {self.short_photographs}, masks {self.short_masks}"

    @property
    def digest_tags(self) -> dict[str, str]:
        """The digests as tags of MLflow runs and of versions."""
        tags = {PHOTOGRAPHS_TAG: self.short_photographs, MASKS_TAG: self.short_masks}
        return {key: value for key, value in tags.items() if value}

    def for_metric(self, metric: str) -> Protocol:
        """The protocol of one metric: other definitions do not matter to it."""
        return replace(self, metrics={name: text for name, text in self.metrics.items() if name == metric})

    def comparable_with(self, other: Protocol) -> bool:
        """Whether scores other than distances can be compared."""
        return not self.differences(other)

    def differences(self, other: Protocol) -> list[str]:
        """Why scores other than distances cannot be compared, in words for a sentence: `other masks (1a2b.. and 3c4d..)`;
        [] if they can."""
        ours, theirs = self._compared_values(), other._compared_values()
        names = [key for key in dict.fromkeys([*ours, *theirs]) if ours.get(key) != theirs.get(key)]
        reasons = []
        if "photographs_sha256" in names:
            reasons.append(f"other photographs ({self.short_photographs} and {other.short_photographs})")
        if "masks_sha256" in names:
            reasons.append(f"other masks ({self.short_masks} and {other.short_masks})")
        explained = {
            *("photographs_sha256", "masks_sha256"),
            *(("photographs", "sizes") if "photographs_sha256" in names else ()),
            *(("masks", "seed", "hole") if "masks_sha256" in names else ()),
        }
        for key in names:
            if key == "metrics":
                changed = sorted(
                    name
                    for name in {**self.metrics, **other.metrics}
                    if self.metrics.get(name) != other.metrics.get(name)
                )
                reasons.append(f"other definitions of metrics ({', '.join(changed)})")
            elif key not in explained:
                reasons.append(f"{_TITLES.get(key, key)} {_text(ours.get(key))} and {_text(theirs.get(key))}")
        return reasons

    def _compared_values(self) -> dict[str, Any]:
        """The fields that decide whether scores are comparable. A frozen set counts by its digest, not by the path where
        it lies; with frozen sets alone the seed decides nothing."""
        values = {key: value for key, value in self.to_dict().items() if key not in IGNORED_IN_DIGEST}
        if frozen := values.pop("frozen_masks", None):
            values["masks"] = [
                f"frozen {frozen[name]['digest']}" if name in frozen else name for name in self.masks
            ]
            if len(frozen) == len(self.masks):
                del values["seed"]
        return values


SHORT_DIGEST = 12  # hexadecimal digits
PHOTOGRAPHS_TAG, MASKS_TAG = "inpaint.photographs", "inpaint.masks"
_TITLES = {
    "hole": "hole values",
    "sizes": "sizes",
    "masks": "masks",
    "seed": "seeds",
    "photographs": "numbers",
}


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


IGNORED_IN_DIGEST = ("versions", "true_edges", "distance", "features")
EMPTY_PROTOCOL = Protocol(0, (), "", (), "", 0, "", "", "", {}, "", None, {})


def short_digest(record: Any) -> str:
    """The first 12 hexadecimal digits of the SHA-256 of a record as JSON."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:SHORT_DIGEST]
