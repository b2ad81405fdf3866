"""Photographs -> webdataset tars with an index each, and one manifest: the same input gives the same bytes.

`pipelines` asks `plan` what there is to do, gives every slice to a task of its own (`write_slice`), and then calls
`assemble` once.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import numpy as np

from data_prep.order import locate
from data_prep.preparing import ShardOptions, encode
from data_prep.slices import READERS, Listing, Slice, deal, read_slices, write_record
from data_prep.sources import PhotoError, Source
from data_prep.storage import BadKey, DeniedKey, MissingKey, Storage
from data_prep.tars import TarWriter, index_name, read_index, write_tar, writing_tar

VERSION = 2
SPLITS = ("train", "val", "test")


def plan(
    source: Source, out: Storage, options: ShardOptions, length: int
) -> tuple[list[Slice], dict[int, dict[str, Any]]]:
    """All slices of a source, and what is known of those that need not be made (again), by their numbers.

    What an earlier run finished in `out`, or was interrupted in, is kept. Raises ValueError when there are shards of
    other options, or the source is empty.
    """
    base = load_manifest(out) if out.exists("manifest.json") else None
    if base and (base["options"] != asdict(options) or base["source"] != source.uri):
        told = {"source": source.uri, **asdict(options)}
        was = {"source": base["source"], **base["options"]}
        name = next(name for name in told if told[name] != was.get(name))
        raise ValueError(
            f"{out.uri} holds shards with {name} {was.get(name)!r}, not {told[name]!r}: choose another folder"
        )
    listing = Listing(source)
    before = read_slices(out, base["slices"]) if base else []
    if None in before:
        raise ValueError(
            f"slices/{before.index(None):05d}.json in {out.uri} is damaged: make the shards anew"
        )
    slices = deal(listing, [known[0] for known in before if known], length)
    there = dict(out.list())
    begun = [piece.number for piece in slices[len(before) :] if piece.record in there]
    found = before + read_slices(out, begun[-1] + 1 if begun else 0, len(before))
    found += [None] * (len(slices) - len(found))
    lost = {
        name for piece, known in zip(slices, before) if known for name in {*known[0].names} - {*piece.names}
    }
    standing = {}
    for piece, known in zip(slices, found, strict=True):
        if known is None or known[0] != piece:
            continue
        part = _part_of(base, *known) if base and piece.number < base["slices"] else known[1]
        whole = all(there.get(entry["name"]) == entry["bytes"] for entry in part["shards"])
        if whole and not any(again["same_as"] in lost for again in part["duplicates"]):
            standing[piece.number] = part
    return slices, standing


def _part_of(base: Mapping[str, Any], piece: Slice, part: Mapping[str, Any]) -> dict[str, Any]:
    """What became of a slice, after what the whole set's duplicates took from it."""
    names = set(piece.names)
    return {
        "shards": [entry for entry in base["shards"] if entry["slice"] == piece.number],
        "rejects": part["rejects"],
        "duplicates": [again for again in base["duplicates"] if again["name"] in names],
    }


def make_slice(source: Source, piece: Slice, out: Storage, options: ShardOptions) -> dict[str, Any]:
    """`write_slice`, and a record that it is done."""
    part = write_slice(source, piece.names, piece.number, out, options)
    write_record(out, piece, part)
    return part


def write_slice(
    source: Source,
    names: Sequence[str],
    index: int,
    out: Storage,
    options: ShardOptions,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Write the photographs `names` as tars {split}-{index:05d}.tar (and -1.tar, -2.tar... as one grows too large) with
    their indexes in `out`, and say what became of each. One photograph is in memory at a time.

    Returns {"shards": [{name, split, slice, count, bytes, sha256}], "rejects": [{name, reason}],
    "duplicates": [{name, same_as}]}, for `assemble`. Raises StorageError when the storage fails.
    """
    seen: dict[str, str] = {}
    rejects, duplicates, shards = [], [], []
    with ExitStack() as stack:
        splits = {split: stack.enter_context(_Split(out, split, index, options)) for split in SPLITS}
        for done, name in enumerate(names, 1):
            try:
                data = source.read(name)
                key = hashlib.sha256(data).hexdigest()[:16]
                if key in seen:
                    duplicates.append({"name": name, "same_as": seen[key]})
                else:
                    encoded, suffix, shape = encode(data, options)
                    seen[key] = name
                    split = splits[_split(source.group(name), key, options)]
                    split.add(key, encoded, suffix, name, shape)
            except (PhotoError, MissingKey, DeniedKey, BadKey) as error:
                rejects.append({"name": name, "reason": str(error)})
            if progress:
                progress(done)
    for split in splits.values():
        shards += split.entries
    return {"shards": shards, "rejects": rejects, "duplicates": duplicates}


class _Split:
    """The tars of one split of a slice, one after the other; a context."""

    def __init__(self, out: Storage, split: str, index: int, options: ShardOptions) -> None:
        self.out, self.split, self.index = out, split, index
        self.limit = int(options.shard_mb * 1_000_000)
        self.entries: list[dict[str, Any]] = []
        self._open = ExitStack()
        self._tar: TarWriter | None = None
        self._more: dict[str, list] = {}

    def __enter__(self) -> _Split:
        return self

    def __exit__(self, *error: Any) -> None:
        if error[0] is None:
            self._end()
        else:
            self._open.__exit__(*error)

    def add(self, key: str, data: bytes, suffix: str, name: str, shape: tuple[int, int]) -> None:
        if self._tar and self._tar.with_another(len(data)) > self.limit:
            self._end()
        if self._tar is None:
            self._more = {"shapes": [], "names": []}
            self._tar = self._open.enter_context(writing_tar(self.out, self._name, self._more))
        self._tar.add(f"{key}.{suffix}", data)
        self._more["shapes"].append(shape)
        self._more["names"].append(name)

    @property
    def _name(self) -> str:
        part = f"-{len(self.entries)}" if self.entries else ""
        return f"{self.split}-{self.index:05d}{part}.tar"

    def _end(self) -> None:
        if self._tar:
            self._open.close()
            entry = self._tar.entry(self._name)
            self.entries.append({**entry, "split": self.split, "slice": self.index})
            self._tar = None


def _split(group: str | None, key: str, options: ShardOptions) -> str:
    """By a hash of the content or of the group, so that a photograph never moves when others come or go."""
    digest = hashlib.sha256((group or key).encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    return "test" if place < options.test else "val" if place < options.test + options.val else "train"


def assemble(
    parts: Sequence[Mapping[str, Any]], options: ShardOptions, source_uri: str, out: Storage
) -> dict[str, Any]:
    """Merge the slices' reports, in the slices' order, into manifest.json, written last; returns the manifest.

    A photograph that two slices hold stays in the first. ValueError when no photograph is usable at all.
    """
    shards = [dict(entry) for part in parts for entry in part["shards"]]
    rejects = [reject for part in parts for reject in part["rejects"]]
    duplicates = [again for part in parts for again in part["duplicates"]]
    for place, again in _repeated(shards, out).items():
        entry, found = without(out, shards[place], again)
        shards[place] = entry
        duplicates += found
    shards = [entry for entry in shards if entry["count"]]
    if not shards:
        reason = f", first {rejects[0]['name']}: {rejects[0]['reason']}" if rejects else ""
        raise ValueError(
            f"data.source {source_uri} holds no usable photograph ({len(rejects)} rejects{reason})"
        )
    shards.sort(key=lambda entry: (SPLITS.index(entry["split"]), entry["name"]))
    manifest = {
        "version": VERSION,
        "source": source_uri,
        "options": asdict(options),
        "digest": _digest(shards),
        "splits": {split: sum(e["count"] for e in shards if e["split"] == split) for split in SPLITS},
        "slices": len(parts),
        "shards": shards,
        "rejects": rejects,
        "duplicates": duplicates,
    }
    out.write("manifest.json", json.dumps(manifest, indent=1).encode())
    named = {file for entry in shards for file in (entry["name"], index_name(entry["name"]))}
    for key in [key for key, _ in out.list() if _OURS.fullmatch(key) and key not in named]:
        out.delete(key)
    return manifest


_OURS = re.compile(rf"({'|'.join(SPLITS)})-\d{{5,}}(-\w+)*\.(tar|json)")


def _repeated(shards: Sequence[Mapping[str, Any]], out: Storage) -> dict[int, dict[str, str]]:
    """Which tars hold photographs that an earlier one has: number -> {key: the earlier one's name}.

    Keys are compared as 64-bit numbers: eight bytes a photograph.
    """
    with ThreadPoolExecutor(READERS) as pool:
        keys = list(
            pool.map(
                lambda entry: np.array(
                    [int(k, 16) for k in read_index(out, entry["name"])["keys"]], np.uint64
                ),
                shards,
            )
        )
    ends = np.cumsum([len(part) for part in keys])
    line = np.concatenate([np.empty(0, np.uint64), *keys])
    order = np.argsort(line, kind="stable")
    same = np.flatnonzero(line[order][1:] == line[order][:-1])
    found: dict[int, dict[str, str]] = {}
    first: dict[int, str] = {}
    for one, other in zip(order[same].tolist(), order[same + 1].tolist(), strict=True):
        if one not in first:  # of three that are the same, the second is told by the first too
            first[one] = _name_at(shards, ends, one, out)
        first[other] = first[one]
        place, _ = locate(ends, other)
        found.setdefault(place, {})[f"{int(line[other]):016x}"] = first[one]
    return found


def _name_at(shards: Sequence[Mapping[str, Any]], ends: np.ndarray, point: int, out: Storage) -> str:
    place, row = locate(ends, point)
    name: str = read_index(out, shards[place]["name"])["names"][row]
    return name


def without(
    out: Storage, entry: Mapping[str, Any], again: Mapping[str, str]
) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """The shard written again, under another name, without some samples; and these, as duplicates.

    Under another name, so that no task that still writes the slice can bring them back.
    """
    index, name = read_index(out, entry["name"]), entry["name"].removesuffix(".tar") + "-unique.tar"
    rows = [row for row, key in enumerate(index["keys"]) if key not in again]
    told = [
        {"name": name, "same_as": again[key]}
        for key, name in zip(index["keys"], index["names"], strict=True)
        if key in again
    ]
    if not rows:
        return {**entry, "count": 0}, told
    more = {field: [index[field][row] for row in rows] for field in ("shapes", "names")}
    suffixes = index["suffixes"]
    members = (
        (
            f"{index['keys'][row]}.{suffixes[row]}",
            out.read_range(entry["name"], index["offsets"][row], index["sizes"][row]),
        )
        for row in rows
    )
    return {**entry, **write_tar(out, name, members, more)}, told


def _digest(shards: Sequence[dict]) -> str:
    """Of the content alone: names and hashes of the tars."""
    return hashlib.sha256(json.dumps([[e["name"], e["sha256"]] for e in shards]).encode()).hexdigest()


def load_manifest(shards: Storage) -> dict[str, Any]:
    """manifest.json of a shard folder; ValueError when it is none, or another version's."""
    try:
        manifest = json.loads(shards.read("manifest.json"))
        version = manifest["version"]
    except MissingKey:
        mend = f"make them with `inpaint shard SOURCE {shards.uri}`"
        raise ValueError(
            f"{shards.uri} holds no finished shards (manifest.json is missing): {mend}"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"manifest.json in {shards.uri} is damaged: make the shards again") from None
    if version != VERSION:
        raise ValueError(
            f"{shards.uri} has shards of version {version}, this is {VERSION}: make the shards again"
        )
    return manifest
