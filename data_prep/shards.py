"""Photographs -> webdataset tars with an index each, and one manifest: the same input gives the same bytes.

`pipelines` gives every slice of the listing to a task of its own (`write_slice`) and then calls `assemble` once.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import cv2
import numpy as np

from data_prep.sources import MAX_PIXELS, PhotoError, Source, decode_photo
from data_prep.storage import BadKey, DeniedKey, MissingKey, Storage

VERSION = 1
SPLITS = ("train", "val", "test")
LONGEST = 16  # a photograph more elongated than this is a strip, not a photograph

cv2.setNumThreads(1)  # a slice is one task's work; tasks run side by side


@dataclass(frozen=True)
class ShardOptions:
    """How photographs are stored: the short side becomes size + margin pixels."""

    size: int = 256
    """pixels: the training crop"""
    margin: int = 0
    """pixels more than the crop, for random crops"""
    crop: Literal["keep", "square"] = "keep"
    """keep the aspect, or cut the centre square first"""
    format: Literal["jpg", "png"] = "jpg"
    quality: int = 95
    """of the JPEGs, 1 to 100; colour is never subsampled"""
    val: float = 0.1
    """share of the photographs that validate"""
    test: float = 0.1
    """share of the photographs that are held out"""
    max_pixels: int = MAX_PIXELS
    """a photograph with more is rejected"""

    def __post_init__(self) -> None:
        rules = {
            "size": (self.size >= 8, "at least 8 pixels"),
            "margin": (self.margin >= 0, "0 or more pixels"),
            "crop": (self.crop in ("keep", "square"), "keep or square"),
            "format": (self.format in ("jpg", "png"), "jpg or png"),
            "quality": (1 <= self.quality <= 100, "1 to 100"),
            "val": (0 <= self.val < 1, "0 to below 1"),
            "test": (
                0 <= self.test < 1 and self.val + self.test < 1,
                "0 to below 1, and below 1 together with val",
            ),
            "max_pixels": (self.max_pixels > 0, "above 0"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise ValueError(f"data.{name} is {getattr(self, name)!r}: {rule}")


def write_slice(
    source: Source,
    names: Sequence[str],
    index: int,
    out: Storage,
    options: ShardOptions,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Write the photographs `names` as {split}-{index:05d}.tar and .json in `out`, and say what became of each.

    Returns {"shards": [{name, split, count, bytes, sha256}], "rejects": [{name, reason}],
    "duplicates": [{name, same_as}]}, for `assemble`. Raises StorageError when the storage fails.
    """
    samples: dict[str, dict[str, tuple[str, bytes, tuple[int, int]]]] = {split: {} for split in SPLITS}
    seen: dict[str, str] = {}
    rejects, duplicates = [], []
    for done, name in enumerate(names, 1):
        try:
            data = source.read(name)
            key = hashlib.sha256(data).hexdigest()[:16]
            if key in seen:
                duplicates.append({"name": name, "same_as": seen[key]})
            else:
                encoded, shape = _prepare(data, options)
                seen[key] = name
                samples[_split(source.group(name), key, options)][key] = name, encoded, shape
        except (PhotoError, MissingKey, DeniedKey, BadKey) as error:
            rejects.append({"name": name, "reason": str(error)})
        if progress:
            progress(done)
    shards = []
    for split, chosen in samples.items():
        if chosen:
            rows = [(key, *chosen[key]) for key in sorted(chosen)]
            members = [(f"{key}.{options.format}", data) for key, _, data, _ in rows]
            more: dict[str, list] = {
                "shapes": [shape for *_, shape in rows],
                "names": [name for _, name, *_ in rows],
            }
            shards.append({**write_tar(out, f"{split}-{index:05d}.tar", members, more), "split": split})
    return {"shards": shards, "rejects": rejects, "duplicates": duplicates}


def _prepare(data: bytes, options: ShardOptions) -> tuple[bytes, tuple[int, int]]:
    """The encoded sample and its (height, width)."""
    target = options.size + options.margin
    photo = decode_photo(data, options.max_pixels, short_side=target)
    height, width = photo.shape[:2]
    short = min(height, width)
    if max(height, width) > LONGEST * short:
        raise PhotoError(f"a strip: {width} x {height} is longer than {LONGEST} times its short side")
    if short * 4 < target:
        raise PhotoError(
            f"too small: {width} x {height}; a quarter of {target} (data.size + data.margin) is the least"
        )
    if options.crop == "square":
        top, left = (height - short) // 2, (width - short) // 2
        photo = photo[top : top + short, left : left + short]
        height = width = short
    shape = max(target, round(height * target / short)), max(target, round(width * target / short))
    if shape != photo.shape[:2]:
        method = cv2.INTER_AREA if short > target else cv2.INTER_CUBIC
        photo = cv2.resize(photo, shape[::-1], interpolation=method)
    settings = [
        cv2.IMWRITE_JPEG_QUALITY,
        options.quality,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
    ]
    bgr = cv2.cvtColor(photo, cv2.COLOR_RGB2BGR)
    return cv2.imencode(f".{options.format}", bgr, settings if options.format == "jpg" else [])[
        1
    ].tobytes(), shape


def _split(group: str | None, key: str, options: ShardOptions) -> str:
    """By a hash of the content or of the group, so that a photograph never moves when others come or go."""
    digest = hashlib.sha256((group or key).encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    return "test" if place < options.test else "val" if place < options.test + options.val else "train"


def write_tar(
    out: Storage, name: str, members: Iterable[tuple[str, bytes]], more: dict[str, list] | None = None
) -> dict[str, Any]:
    """Publish a tar of (file name, bytes) with fixed times and owners, after its index (the same name, .json).

    The index says where each member's bytes lie, so that one positioned read fetches a sample.
    """
    body = io.BytesIO()
    keys, offsets, sizes = [], [], []
    with tarfile.open(fileobj=body, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for member, data in members:
            info = tarfile.TarInfo(member)
            info.size, info.mode = len(data), 0o444
            keys.append(member.partition(".")[0])
            offsets.append(body.tell() + tarfile.BLOCKSIZE)
            sizes.append(len(data))
            tar.addfile(info, io.BytesIO(data))
    index = {"keys": keys, "offsets": offsets, "sizes": sizes, **(more or {})}
    out.write(index_name(name), json.dumps(index).encode())
    content = body.getvalue()
    out.write(name, content)
    return {
        "name": name,
        "count": len(keys),
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }


def index_name(shard: str) -> str:
    return shard.removesuffix(".tar") + ".json"


def read_index(shards: Storage, shard: str) -> dict[str, list]:
    """keys, offsets, sizes of a tar's samples; photographs' tars also have shapes ([height, width]) and names."""
    return json.loads(shards.read(index_name(shard)))


def assemble(
    parts: Iterable[dict[str, Any]], options: ShardOptions, source_uri: str, out: Storage
) -> dict[str, Any]:
    """Merge the slices' reports, in the slices' order, into manifest.json, written last; returns the manifest.

    A photograph that two slices hold stays in the first. ValueError when no photograph is usable at all.
    """
    shards, rejects, duplicates = [], [], []
    first: dict[str, str] = {}
    for part in parts:
        rejects += part["rejects"]
        duplicates += part["duplicates"]
        for entry in part["shards"]:
            index = read_index(out, entry["name"])
            again = {key for key in index["keys"] if key in first}
            for key, name in zip(index["keys"], index["names"], strict=True):
                if key in again:
                    duplicates.append({"name": name, "same_as": first[key]})
                first.setdefault(key, name)
            kept = _without(out, entry, index, again) if again else entry
            if kept:
                shards.append(kept)
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
        "shards": shards,
        "rejects": rejects,
        "duplicates": duplicates,
    }
    out.write("manifest.json", json.dumps(manifest, indent=1).encode())
    return manifest


def _without(out: Storage, entry: dict, index: dict[str, list], keys: set[str]) -> dict[str, Any] | None:
    """The shard written again without some samples; None, and removed, when none is left."""
    rows = [row for row, key in enumerate(index["keys"]) if key not in keys]
    if not rows:
        out.delete(entry["name"])
        out.delete(index_name(entry["name"]))
        return None
    with tarfile.open(fileobj=io.BytesIO(out.read(entry["name"]))) as tar:
        files = [(info.name, tar.extractfile(info)) for info in tar]
        members = [(name, file.read()) for name, file in files if file and name.partition(".")[0] not in keys]
    more = {field: [index[field][row] for row in rows] for field in ("shapes", "names")}
    return {**write_tar(out, entry["name"], members, more), "split": entry["split"]}


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


def decode_sample(data: bytes) -> np.ndarray:
    """A stored photograph as uint8 RGB [H,W,3]."""
    photo = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    if photo is None:
        raise ValueError("a stored photograph cannot be decoded: the shards are damaged, make them again")
    return photo
