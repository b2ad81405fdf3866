"""Whether shards are what their manifests say: one tar at a time, a pure function of it that names what is wrong."""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data_prep.canny import decode_edges
from data_prep.slices import READERS, Slice, read_slices
from data_prep.storage import MissingKey, Storage, StorageError
from data_prep.tars import index_name, read_index

PLAIN = re.compile(r"[0-9a-f]{16}\.[a-z0-9]+")
"""A member's name: nothing that leads out of a folder, and no scheme that a reader could run."""
MANIFEST, EDGES = "manifest.json", "edges.json"


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


@dataclass(frozen=True)
class EdgeSet:
    """Edges of one sigma beside a folder of shards, as `inpaint edges` lays them."""

    sigma: float
    folder: Storage
    entries: Mapping[str, Mapping[str, Any]] | None
    """of edges.json, by tar; None where it cannot be read"""
    problem: str = ""
    """what is wrong with edges.json"""


def edge_sets(shards: Storage, shards_digest: str) -> list[EdgeSet]:
    """Every set in the folder edges/, by sigma; what is no set of edges there is passed over."""
    found = []
    for name in sorted({key.split("/")[0] for key, _ in shards.sub("edges").list() if "/" in key}):
        folder, told = shards.sub(f"edges/{name}"), re.fullmatch(r"sigma-(\d+(?:\.\d+)?)", name)
        try:
            listed = json.loads(folder.read("edges.json"))
            entries = {entry["name"]: entry for entry in listed["shards"]}
            whole = all(
                _is_entry(entry) and isinstance(entry["photos_sha256"], str) for entry in entries.values()
            )
            sigma, digest = float(listed["sigma"]), listed["shards_digest"]
        except MissingKey:
            problem = "is missing: these edges were never finished, or it was lost"
        except (ValueError, KeyError, TypeError, AttributeError):
            problem = "is damaged"
        else:
            problem = "" if digest == shards_digest else "was made from other shards"
            found.append(
                EdgeSet(sigma, folder, entries if whole else None, problem if whole else "is damaged")
            )
            continue
        if told:
            found.append(EdgeSet(float(told[1]), folder, None, problem))
    return sorted(found, key=lambda edges: edges.sigma)


def _is_entry(entry: Mapping[str, Any]) -> bool:
    kinds = {"name": str, "count": int, "bytes": int, "sha256": str}
    return all(isinstance(entry.get(field), kind) for field, kind in kinds.items())


def check_manifest(shards: Storage, manifest: Mapping[str, Any]) -> list[Finding]:
    """manifest.json against itself, and the records of its slices. ValueError when it is too damaged to check by."""
    try:
        entries, splits, slices = manifest["shards"], dict(manifest["splits"]), int(manifest["slices"])
        whole = all(_is_entry(entry) and entry["split"] in splits for entry in entries)
        whole = whole and isinstance(manifest["options"], dict) and isinstance(manifest["digest"], str)
    except (ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise ValueError(
            f"manifest.json in {shards.uri} is damaged: remove it and run `inpaint shard SOURCE {shards.uri}` again, "
            "which keeps the tars that are whole"
        )
    mend = f"`inpaint shard {manifest['source']} {shards.uri}` writes it anew"
    found = []
    for split, told in splits.items():
        held = sum(entry["count"] for entry in entries if entry["split"] == split)
        if held != told:
            found.append(
                Finding(MANIFEST, "", f"says {told} {split} photographs, its tars hold {held}; {mend}")
            )
    times = Counter(entry["name"] for entry in entries)
    found += [Finding(MANIFEST, "", f"names {name} {n} times; {mend}") for name, n in times.items() if n > 1]
    what = "is damaged or missing: photographs can be neither added nor repaired; make the shards anew"
    for start in range(0, slices, READERS):  # a record names a slice's photographs: never all in memory
        stop = min(start + READERS, slices)
        for number, record in zip(range(start, stop), read_slices(shards, stop, start), strict=True):
            if record is None:
                found.append(Finding(Slice(number, (), ()).record, "", what))
    return found


def check_photographs(
    shards: Storage, entry: Mapping[str, Any], decode: Callable[[bytes], np.ndarray]
) -> Checked:
    """A tar of photographs against its entry in the manifest: sum, members, index; and every one decodes."""
    found, index = _check_tar(shards, entry, decode, None)
    if index is None:
        return found  # said already
    for column in ("shapes", "names"):
        listed = index.get(column)
        if not isinstance(listed, list) or len(listed) != len(index["keys"]):
            what = f"its index does not give each sample one of its {column}"
            found.findings.append(Finding(entry["name"], "", what))
            return found
    for key, shape, expected in zip(found.keys, found.shapes, index["shapes"]):
        if shape is not None and list(shape[:2]) != expected:
            what = f"is {list(shape[:2])} instead of {expected} as the index says"
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
    found, _ = _check_tar(edges, entry, decode_edges, sigma)
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
) -> tuple[Checked, dict[str, list] | None]:
    """What is wrong with a tar, and its index (None: it, or the tar, cannot be read)."""
    found, name = Checked(), entry["name"]

    def note(what: str, sample: str = "") -> None:
        found.findings.append(Finding(name, sample, what, sigma))

    try:
        data = storage.read(name)
        index = read_index(storage, name)
    except MissingKey as error:
        note(str(error).split(";")[0])
        return found, None
    except (StorageError, ValueError) as error:
        note(str(error))
        return found, None
    if not _typed(index):
        note(f"{index_name(name)} is damaged: it holds other things than keys, places and sums")
        return found, None
    if len(data) != entry["bytes"]:
        note(f"has {len(data)} bytes instead of {entry['bytes']}")
    elif hashlib.sha256(data).hexdigest() != entry["sha256"]:
        note("its bytes are not those that were written (sha256)")
    if len(index["keys"]) != entry["count"] or len(set(index["keys"])) != len(index["keys"]):
        note(f"its index names {len(set(index['keys']))} samples instead of {entry['count']}")
    if index["offsets"] != sorted(index["offsets"]):
        note("its index is not in the tar's order")  # the order of training would be another
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
            except Exception as error:  # a picture made to do harm makes decoders raise nearly anything
                reason = str(error).split(":")[0] if isinstance(error, ValueError) else type(error).__name__
                note(reason if isinstance(error, ValueError) else f"cannot be decoded ({reason})", key)
        found.keys.append(key)
        found.shapes.append(shape)
    return found, index


def _typed(index: Mapping[str, list]) -> bool:
    """Whether the index holds what it should; bool is an int to Python, not to us."""
    texts, numbers = ("keys", "suffixes"), ("offsets", "sizes", "crc32")
    return all(isinstance(value, str) for column in texts for value in index[column]) and all(
        type(value) is int and value >= 0 for column in numbers for value in index[column]
    )


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
    except Exception as error:  # headers made to do harm make tarfile raise more than its own errors
        note(f"is no whole tar ({' '.join(str(error).split())})")
    if missing := sorted(expected.keys() - seen):
        note(f"lacks {missing[0]}" + (f" and {len(missing) - 1} more" if len(missing) > 1 else ""))
