"""The recorded moves of aliases, stored as tags of the registered model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

HISTORY_PREFIX = "history."  # of the tag that stores a move: history.ALIAS.NUMBER


@dataclass(frozen=True)
class AliasMove:
    """One recorded move of an alias from one version to another."""

    id: str
    """Of the proposal that was decided on."""
    number: int
    """Index among the alias's moves, from 0; -1: not on record."""
    alias: str
    action: str
    """promote or rollback."""
    to: str
    from_: str | None
    """The version that had the alias before; stored as `from`."""
    when: str
    """UTC, ISO 8601."""
    who: str
    reason: str = ""
    score: float | None = None
    comparison: Mapping[str, Any] | None = None
    """The paired difference between the two versions, and the photographs it was measured on."""
    forced: bool = False
    """Promoted although the version was worse or could not be compared."""

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> AliasMove:
        """Decode a tag's JSON of any release: fields may be missing, unknown fields are ignored."""
        optional = {key: record[key] for key in ("reason", "score", "comparison", "forced") if key in record}
        return cls(
            id=str(record.get("id", "")),
            number=int(record.get("number", -1)),
            alias=str(record["alias"]),
            action=str(record.get("action", "promote")),
            to=str(record["to"]),
            from_=record.get("from"),
            when=str(record.get("when", "")),
            who=str(record.get("who", "")),
            **optional,
        )

    def as_json(self) -> dict[str, Any]:
        """The record for the tag. Deterministic: two processes that write the same move write the same text."""
        record = {key.rstrip("_"): value for key, value in vars(self).items()}
        if record["comparison"] is None:
            del record["comparison"]
        if not record["forced"]:
            del record["forced"]
        return record


def alias_history(tags: Mapping[str, str], alias: str) -> list[AliasMove]:
    """The moves of one alias in a registered model's tags, oldest first."""
    moves = [
        (key, AliasMove.from_record(json.loads(text)))
        for key, text in tags.items()
        if key.startswith(HISTORY_PREFIX)
    ]
    return [
        move
        for _, move in sorted(moves, key=lambda entry: (entry[1].number, entry[0]))
        if move.alias == alias
    ]


def full_history(tags: Mapping[str, str]) -> list[AliasMove]:
    """The moves of all aliases in a registered model's tags, oldest first."""
    aliases = dict.fromkeys(json.loads(tags[key])["alias"] for key in tags if key.startswith(HISTORY_PREFIX))
    return sorted(
        [move for alias in aliases for move in alias_history(tags, alias)], key=lambda move: move.when
    )
