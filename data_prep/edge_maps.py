"""Edge maps of shards: for each tar of photographs an edge tar with the same keys, as one-bit PNGs."""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from data_prep.canny import canny_edges
from data_prep.manifest import ShardEntry, TarEntry, stored_version
from data_prep.preprocess import decode_sample
from data_prep.records import RecordError, decode, from_json, to_json
from data_prep.storage import MissingKey, Storage
from data_prep.tars import index_name, open_tar_for_write, read_index

EDGE_MANIFEST = "edges.json"
EDGE_MANIFEST_VERSION = 1  # the only version that is read


@dataclass(frozen=True)
class EdgeTarEntry(TarEntry):
    """An edge tar. It has the name of its photograph tar."""

    photos_sha256: str
    """of the photograph tar"""


@dataclass(frozen=True)
class EdgeManifest:
    """edges.json. Its fields are stored in this order."""

    version: int
    sigma: float
    """pixels"""
    shards_digest: str
    """digest of the photographs' manifest"""
    shards: tuple[EdgeTarEntry, ...]


def write_edge_tars(
    shards: Storage,
    entry: ShardEntry,
    outputs: Mapping[float, Storage],
    decode: Callable[[bytes], np.ndarray] = decode_sample,
) -> dict[float, EdgeTarEntry]:
    """Write the edge tars of one photograph tar, one per sigma into outputs[sigma]: the same name, keys and order, each
    map a one-bit PNG. Each photograph is decoded once.

    Returns the entry for each sigma, for `write_edge_manifest`. A finished edge tar of the same photographs is kept.
    Raises ValueError if the photograph tar does not have the entry's checksum.
    """
    name = entry.name
    done = {sigma: existing for sigma, out in outputs.items() if (existing := _existing_entry(out, entry))}
    if len(done) == len(outputs):
        return done
    index, tar = read_index(shards, name), shards.read(name)
    if hashlib.sha256(tar).hexdigest() != entry.sha256:
        raise ValueError(f"{name} in {shards.uri} is not what the manifest says: rebuild the shards")
    with ExitStack() as stack:
        extra_fields: dict[float, dict[str, Any]] = {
            sigma: {"photos_sha256": entry.sha256} for sigma in outputs if sigma not in done
        }
        edge_tars = {
            sigma: stack.enter_context(open_tar_for_write(outputs[sigma], name, extra))
            for sigma, extra in extra_fields.items()
        }
        for key, offset, size in zip(index["keys"], index["offsets"], index["sizes"], strict=True):
            photo = decode(tar[offset : offset + size])
            for sigma, edge_tar in edge_tars.items():
                edge_tar.add(f"{key}.png", encode_edges(canny_edges(photo, sigma)))
        for sigma, edge_tar in edge_tars.items():
            edge_tar.finish()
            done[sigma] = EdgeTarEntry(**vars(edge_tar.entry(name)), photos_sha256=entry.sha256)
            extra_fields[sigma]["entry"] = to_json(done[sigma])
    return done


def _existing_entry(out: Storage, photos: ShardEntry) -> EdgeTarEntry | None:
    """The entry of a finished edge tar of these photographs; None if there is none."""
    try:
        index = read_index(out, photos.name)
        entry = from_json(EdgeTarEntry, index["entry"], index_name(photos.name))
    except (MissingKey, ValueError, KeyError):
        return None
    is_current = entry.photos_sha256 == photos.sha256 and out.size(photos.name) == entry.bytes
    return entry if is_current else None


_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_IHDR_1BIT_GRAY = struct.pack(">BBBBB", 1, 0, 0, 0, 0)  # one bit, grey, deflate, no interlacing


def encode_edges(edges: np.ndarray) -> bytes:
    """bool [H,W] as a PNG with one bit per pixel and unfiltered rows: smallest for lines, and `decode_edges` only
    inflates and unpacks it."""
    height, width = edges.shape
    rows = np.zeros((height, 1 + (width + 7) // 8), np.uint8)
    rows[:, 1:] = np.packbits(edges, axis=1)
    header = struct.pack(">II", width, height) + _IHDR_1BIT_GRAY
    # level 9 takes ten times as long as level 5 and saves one per cent
    deflate = zlib.compressobj(5, zlib.DEFLATED, 15, 9, zlib.Z_FILTERED)
    body = deflate.compress(rows.tobytes()) + deflate.flush()
    chunks = _png_chunk(b"IHDR", header) + _png_chunk(b"IDAT", body) + _png_chunk(b"IEND", b"")
    return _PNG_SIGNATURE + chunks


def _png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def decode_edges(data: bytes) -> np.ndarray:
    """uint8 [H,W], 1 = edge, from any PNG; those of `encode_edges` are decoded faster. Raises ValueError if the map is
    damaged."""
    if data[:8] == _PNG_SIGNATURE and data[24:29] == _IHDR_1BIT_GRAY and data[37:41] == b"IDAT":
        width, height = struct.unpack(">II", data[16:24])
        (size,) = struct.unpack(">I", data[33:37])
        with suppress(zlib.error, ValueError):
            rows = np.frombuffer(zlib.decompress(data[41 : 41 + size]), np.uint8).reshape(height, -1)
            if rows.shape[1] == 1 + (width + 7) // 8 and not rows[:, 0].any():
                return np.unpackbits(rows[:, 1:], axis=1, count=width)
    edges = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE) if data else None
    if edges is None:
        raise ValueError("an edge map cannot be decoded: rebuild the edges")
    return np.minimum(edges, 1)


def write_edge_manifest(
    entries: Iterable[EdgeTarEntry], sigma: float, shards_digest: str, out: Storage
) -> EdgeManifest:
    """Write edges.json, which marks the edges as finished, and return it."""
    manifest = EdgeManifest(EDGE_MANIFEST_VERSION, sigma, shards_digest, tuple(entries))
    out.write(EDGE_MANIFEST, json.dumps(to_json(manifest), indent=1).encode())
    return manifest


def load_edge_manifest(edges: Storage, shards_digest: str) -> EdgeManifest:
    """edges.json. Raises ValueError, in one line, if it is missing, damaged, of another version or of other shards."""
    try:
        manifest = read_edge_manifest(edges)
    except MissingKey:
        hint = "make them with `inpaint edges SHARDS --sigma S`"
        raise ValueError(f"{edges.uri} holds no finished edges (edges.json is missing): {hint}") from None
    if manifest.shards_digest != shards_digest:
        raise ValueError(f"the edges in {edges.uri} were made from other shards: rebuild them")
    return manifest


def read_edge_manifest(edges: Storage) -> EdgeManifest:
    """edges.json of any shards. Raises MissingKey, or ValueError if it is damaged or of another version."""
    text = edges.read(EDGE_MANIFEST)
    try:
        manifest = decode(EdgeManifest, text, EDGE_MANIFEST)
        version = manifest.version
    except RecordError as error:
        version = stored_version(text)
        if version in (EDGE_MANIFEST_VERSION, None):
            raise ValueError(
                f"edges.json in {edges.uri} is damaged ({error.problem}): rebuild the edges"
            ) from None
    if version != EDGE_MANIFEST_VERSION:
        raise ValueError(
            f"{edges.uri} has edges of version {version}, this is {EDGE_MANIFEST_VERSION}: rebuild the edges"
        )
    return manifest
