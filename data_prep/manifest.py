"""manifest.json of a shard folder and its entries, as dataclasses."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, get_args

from data_prep.left_out import LeftOutEntry, left_out_lines, left_out_total, printable
from data_prep.preprocess import ShardOptions
from data_prep.records import RecordError, decode, to_json
from data_prep.storage import MissingKey, Storage

MANIFEST = "manifest.json"
MANIFEST_VERSION = 3
"""Of the format that is written. Version 2 (release 0.1.0) can be read, not added to; others can be neither."""
Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)


@dataclass(frozen=True)
class TarEntry:
    """A tar and its content."""

    name: str
    count: int
    """samples"""
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ShardEntry(TarEntry):
    """A photograph tar."""

    split: Split
    partition: int
    """index of the partition that wrote it"""


@dataclass(frozen=True)
class Reject:
    """A file that is not a usable photograph, and the reason."""

    name: str
    reason: str


@dataclass(frozen=True)
class Duplicate:
    """A photograph with the same bytes as another one, which is kept."""

    name: str
    duplicate_of: str
    """name of the other one"""


@dataclass(frozen=True)
class PartitionResult:
    """The tars, rejects and duplicates of one partition."""

    shards: tuple[ShardEntry, ...]
    rejects: tuple[Reject, ...]
    duplicates: tuple[Duplicate, ...]


@dataclass(frozen=True)
class Manifest:
    """manifest.json. Its fields are stored in this order."""

    version: int
    source: str
    """the source's uri"""
    options: ShardOptions
    digest: str
    """sha256 of the tars' names and hashes: of the content only"""
    splits: Mapping[str, int]
    """photographs per split"""
    partitions: int
    """number of partitions"""
    shards: tuple[ShardEntry, ...]
    rejects: tuple[Reject, ...]
    duplicates: tuple[Duplicate, ...]
    left_out: Mapping[str, LeftOutEntry] | None = None
    """by kind; None in manifests from before this field existed"""

    def shards_of_split(self, split: str) -> list[ShardEntry]:
        """The tars of a split, in the manifest's order."""
        return [entry for entry in self.shards if entry.split == split]


def count_text(manifest: Manifest) -> str:
    """`84 train, 12 val, 12 test; 3 rejects, 1 duplicate, 2 left out`; after the splits, without what there is none of."""
    splits = ", ".join(f"{count} {split}" for split, count in manifest.splits.items())
    others = (
        (len(manifest.rejects), "reject"),
        (len(manifest.duplicates), "duplicate"),
        (left_out_total(manifest.left_out or {}), "left out"),
    )
    texts = [f"{n} {word}{'' if n == 1 or word == 'left out' else 's'}" for n, word in others if n]
    return "; ".join([splits, ", ".join(texts)] if texts else [splits])


def describe_exclusions(manifest: Manifest, max_listed: int = 10) -> dict[str, str]:
    """The number and first names, with reasons, of `rejects`, `duplicates` and, if recorded, `left out` files.

    The text is printable; without files it is `0`.
    """

    def list_entries(entries: Sequence[str]) -> str:
        hidden = f"; and {len(entries) - max_listed} more" if len(entries) > max_listed else ""
        names = "; ".join(entries[:max_listed])
        return f"{len(entries)}{f' ({names}{hidden})' if entries else ''}"

    facts = {
        "rejects": list_entries([f"{reject.name}: {reject.reason}" for reject in manifest.rejects]),
        "duplicates": list_entries(
            [f"{entry.name} is a copy of {entry.duplicate_of}" for entry in manifest.duplicates]
        ),
    }
    if manifest.left_out is not None:
        facts["left out"] = "; ".join(left_out_lines(manifest.left_out, max_listed)) or "0"
    return {name: printable(text) for name, text in facts.items()}


def content_digest(shards: Iterable[TarEntry]) -> str:
    """sha256 of the names and hashes of the tars."""
    return hashlib.sha256(json.dumps([[e.name, e.sha256] for e in shards]).encode()).hexdigest()


def write_manifest(shards: Storage, manifest: Manifest) -> None:
    """Publish manifest.json. The files that it names must exist already."""
    record: dict[str, Any] = to_json(manifest)
    if manifest.left_out is None:
        del record["left_out"]
    shards.write(MANIFEST, json.dumps(record, indent=1).encode())


def load_manifest(shards: Storage) -> Manifest:
    """manifest.json of a shard folder. Raises ValueError if it is missing, damaged, or of another version."""
    try:
        text = shards.read(MANIFEST)
    except MissingKey:
        hint = f"make them with `inpaint shard SOURCE {shards.uri}`"
        raise ValueError(
            f"{shards.uri} holds no finished shards (manifest.json is missing): {hint}"
        ) from None
    try:
        manifest = _decode(text)
        version: Any = manifest.version
    except RecordError as error:
        version = stored_version(text)
        if version in (MANIFEST_VERSION, 2, None):
            raise ValueError(
                f"manifest.json in {shards.uri} is damaged ({error.problem}): remove it and run `inpaint shard SOURCE "
                f"{shards.uri}` again, which keeps the intact tars"
            ) from None
    if version not in (MANIFEST_VERSION, 2):
        raise ValueError(
            f"{shards.uri} has shards of version {version}, this is {MANIFEST_VERSION}: rebuild the shards"
        )
    return manifest


def _decode(text: bytes) -> Manifest:
    """A manifest of this version, or of release 0.1.0: registered versions are compared on the shards that they were
    scored on. Raises RecordError."""
    try:
        return decode(Manifest, text, MANIFEST)
    except RecordError:
        if stored_version(text) != 2:
            raise
        return decode(Manifest, _from_version_2(text), MANIFEST)


def _from_version_2(text: bytes) -> bytes:
    """The text of a manifest of release 0.1.0 with the fields of today."""
    record = json.loads(text)
    with suppress(KeyError, TypeError, AttributeError):  # decoding names what is damaged
        if "slices" in record:
            record["partitions"] = record.pop("slices")
        options = record["options"]
        options["max_shard_mb"] = options.pop("shard_mb")
        options["crop"] = {"keep": "none"}.get(options["crop"], options["crop"])
        rename_version_2_entries(record)
    return json.dumps(record).encode()


def rename_version_2_entries(record: dict[str, Any]) -> None:
    """Give the shards and duplicates in a record of release 0.1.0 the field names of today."""
    for entry in record["shards"]:
        entry["partition"] = entry.pop("slice")
    for entry in record["duplicates"]:
        entry["duplicate_of"] = entry.pop("same_as")


def stored_version(text: bytes) -> Any:
    """The `version` of a stored record, even if the rest is invalid; None if it has none."""
    try:
        return json.loads(text).get("version")
    except (ValueError, AttributeError, RecursionError):
        return None
