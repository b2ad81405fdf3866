"""The recorded moves of aliases, stored as tags of the registered model, and the state that they lead to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

HISTORY_PREFIX = "history."  # of the tag that stores a move: history.ALIAS.NUMBER
REJECTED_TAG = "not_champion"  # of a version: why it did not become champion


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

    @property
    def date(self) -> str:
        """`2026-11-30 15:51 UTC`."""
        return f"{self.when[:16].replace('T', ' ')} UTC"

    @property
    def sentence(self) -> str:
        """`version 2 became champion instead of version 1, by ann: psnr_rgb_hole 18.52 against ...`"""
        before = f" instead of version {self.from_}" if self.from_ else ""
        move = f"version {self.to} became {self.alias}{before}"
        if self.action == "rollback":
            move = f"{self.alias} went back from version {self.from_} to version {self.to}"
        forced = ", forced" if self.forced else ""
        who = f" by {self.who}" if self.who else ""
        return f"{move}{forced}{',' if who and not forced else ''}{who}{f': {self.reason}' if self.reason else ''}"

    def as_json(self) -> dict[str, Any]:
        """The record for the tag. Deterministic: two processes that write the same move write the same text."""
        # `text` is for people who see the tag in MLflow; it is not read
        record = {"text": self.sentence} | {key.rstrip("_"): value for key, value in vars(self).items()}
        if record["comparison"] is None:
            del record["comparison"]
        if not record["forced"]:
            del record["forced"]
        return record


@dataclass(frozen=True)
class AliasState:
    """The version that has an alias, or None, and the alias's moves so far."""

    version: str | None
    moves: tuple[AliasMove, ...]

    @property
    def version_stack(self) -> list[str]:
        """The versions that rollbacks return to, the current version last."""
        versions: list[str] = []
        for move in self.moves:
            versions = _truncate_at(versions, move.from_)
            versions = versions[:-1] if move.action == "rollback" else [*versions, move.to]
        return _truncate_at(versions, self.version)

    @property
    def previous_version(self) -> str | None:
        """The version that a rollback returns to; None: there is none on record."""
        return self.version_stack[-2] if self.version and len(self.version_stack) > 1 else None

    def as_json(self) -> dict[str, Any]:
        return {"version": self.version, "moves": [move.as_json() for move in self.moves]}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> AliasState:
        """Decode the output of `as_json`."""
        return cls(record["version"], tuple(AliasMove.from_record(move) for move in record["moves"]))


@dataclass(frozen=True)
class Rejection:
    """A version that did not become champion when it was registered."""

    version: str
    when: str
    """UTC, ISO 8601: when it was registered."""
    reason: str

    @property
    def date(self) -> str:
        return f"{self.when[:16].replace('T', ' ')} UTC"

    @property
    def sentence(self) -> str:
        return f"version {self.version} did not become champion: {self.reason}"


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


def _truncate_at(versions: list[str], version: str | None) -> list[str]:
    """The stack up to the last occurrence of `version`; only `version` if it does not occur.

    The alias may have been set by other means, or a process may have died before it set the alias.
    """
    if version in versions:
        return versions[: len(versions) - versions[::-1].index(version)]
    return [version] if version else []
