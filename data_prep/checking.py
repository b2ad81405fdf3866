"""Whether shards are what their manifests say: one tar at a time, a pure function of it that names what is wrong."""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data_prep.canny import decode_edges
from data_prep.storage import MissingKey, Storage, StorageError
from data_prep.tars import read_index

PLAIN = re.compile(r"[0-9a-f]{16}\.[a-z0-9]+")
"""A member's name: nothing that leads out of a folder, and no scheme that a reader could run."""


@dataclass(frozen=True)
class Finding:
    """Something wrong with a sample of a tar, or with the tar itself (sample "")."""

    shard: str
    sample: str
    what: str
    sigma: float | None = None
    """of the edge tar; None: of the photographs"""

    def __str__(self) -> str:
        edges = "" if self.sigma is None else f"edges of sigma {self.sigma:g}, "
        return f"{edges}{' '.join(filter(None, (self.shard, self.sample)))}: {self.what}"


@dataclass
class Checked:
    """What is wrong with a tar, and its samples' keys and shapes [height, width] where they could be read."""

    findings: list[Finding] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    shapes: list[tuple[int, ...] | None] = field(default_factory=list)


def check_photographs(
    shards: Storage, entry: Mapping[str, Any], decode: Callable[[bytes], np.ndarray]
) -> Checked:
    """A tar of photographs against its entry in the manifest: sum, members, index; and every one decodes."""
    found = _check_tar(shards, entry, decode, None)
    try:
        told = read_index(shards, entry["name"])["shapes"]
    except (ValueError, KeyError, StorageError):
        return found  # said already
    for key, shape, expected in zip(found.keys, found.shapes, told):
        if shape is not None and list(shape[:2]) != list(expected):
            what = f"is {list(shape[:2])} instead of {list(expected)} as the index says"
            found.findings.append(Finding(entry["name"], key, what))
    return found


def check_edges(
    edges: Storage,
    entry: Mapping[str, Any] | None,
    photos: Mapping[str, Any],
    photographs: Checked,
    sigma: float,
) -> Checked:
    """An edge tar against its entry in edges.json (None: it has none) and against its photographs."""
    if entry is None:
        return Checked([Finding(photos["name"], "", "edges.json does not name it", sigma)])
    found = _check_tar(edges, entry, decode_edges, sigma)
    if entry["photos_sha256"] != photos["sha256"]:
        found.findings.append(Finding(entry["name"], "", "was made from other photographs", sigma))
    elif photographs.keys and found.keys and photographs.keys != found.keys:
        what = "its keys are not those of the photographs, in their order"
        found.findings.append(Finding(entry["name"], "", what, sigma))
    else:
        for key, ours, theirs in zip(found.keys, found.shapes, photographs.shapes):
            if ours and theirs and ours != theirs[:2]:
                what = f"is {list(ours)}, its photograph {list(theirs[:2])}"
                found.findings.append(Finding(entry["name"], key, what, sigma))
    return found


def _check_tar(
    storage: Storage, entry: Mapping[str, Any], decode: Callable[[bytes], np.ndarray], sigma: float | None
) -> Checked:
    found, name = Checked(), entry["name"]

    def note(what: str, sample: str = "") -> None:
        found.findings.append(Finding(name, sample, what, sigma))

    try:
        data = storage.read(name)
        index = read_index(storage, name)
    except MissingKey as error:
        note(str(error).split(";")[0])
        return found
    except (StorageError, ValueError) as error:
        note(str(error))
        return found
    if len(data) != entry["bytes"]:
        note(f"has {len(data)} bytes instead of {entry['bytes']}")
    elif hashlib.sha256(data).hexdigest() != entry["sha256"]:
        note("its bytes are not those that were written (sha256)")
    if len(index["keys"]) != entry["count"] or len(set(index["keys"])) != len(index["keys"]):
        note(f"its index names {len(set(index['keys']))} samples instead of {entry['count']}")
    _check_members(data, index, note)
    places = zip(index["keys"], index["offsets"], index["sizes"], index["crc32"], strict=True)
    for key, offset, size, crc in places:
        sample, shape = data[offset : offset + size], None
        if len(sample) != size:
            note("lies beyond the tar's end", key)
        elif zlib.crc32(sample) != crc:
            note("its bytes are not those that were written (CRC-32)", key)
        else:
            try:
                shape = decode(sample).shape
            except ValueError as error:
                note(str(error).split(":")[0], key)
        found.keys.append(key)
        found.shapes.append(shape)
    return found


def _check_members(data: bytes, index: Mapping[str, list], note: Callable[..., None]) -> None:
    """The tar's own headers: plain files, where the index says."""
    expected = {
        f"{key}.{suffix}": (offset, size)
        for key, suffix, offset, size in zip(
            index["keys"], index["suffixes"], index["offsets"], index["sizes"], strict=True
        )
    }
    seen = set()
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for member in tar:
                seen.add(member.name)
                if not member.isreg() or not PLAIN.fullmatch(member.name):
                    kind = "link" if member.islnk() or member.issym() else "member"
                    note(f"the {kind} {member.name!r} does not belong in a shard; do not unpack it")
                elif expected.get(member.name) != (member.offset_data, member.size):
                    note(f"the member {member.name} is not where the index says")
    except tarfile.TarError as error:
        note(f"is no whole tar ({error})")
    if missing := sorted(expected.keys() - seen):
        note(f"lacks {missing[0]}" + (f" and {len(missing) - 1} more" if len(missing) > 1 else ""))
