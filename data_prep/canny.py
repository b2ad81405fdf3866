"""Canny edges as EdgeConnect's data has them: the results of skimage.feature.canny, several times faster.

Three things matter (papers.md 4.3): a float blur that is renormalised where it meets the border or a hole, thresholds
0.1 and 0.2 of the range on Sobel's magnitude, and non-maximum suppression that interpolates along the gradient.
"""

from __future__ import annotations

import functools
import hashlib
import json
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from typing import Any

import cv2
import numpy as np

from data_prep.preparing import decode_sample
from data_prep.storage import MissingKey, Storage
from data_prep.tars import index_name, read_index, writing_tar

LOW, HIGH = 0.1, 0.2  # thresholds on the magnitude of an image in [0,1]
_GREY = np.array([[0.2125, 0.7154, 0.0721]], np.float32) / 255  # skimage's rgb2gray, not OpenCV's weights


def canny_edges(image: np.ndarray, sigma: float, mask: np.ndarray | None = None) -> np.ndarray:
    """Edges as bool [H,W] of an image uint8 [H,W] or [H,W,3] (RGB).

    `sigma` is the Gaussian's standard deviation in pixels; 0 does not blur. With `mask` [H,W], non-zero = hole, there
    are no edges in the hole, on its rim, or caused by what it holds: skimage's mask=~hole. No edges on the image's
    outermost pixels. Raises ValueError for other types, shapes or a negative sigma.
    """
    if image.dtype != np.uint8 or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)):
        raise ValueError(f"canny_edges takes uint8 [H,W] or [H,W,3], not {image.dtype} {list(image.shape)}")
    if not 0 <= sigma < 1000:
        raise ValueError(f"sigma {sigma}: 0 (no blur) or a number of pixels above")
    if mask is not None and mask.shape != image.shape[:2]:
        raise ValueError(f"mask {list(mask.shape)} does not fit the image {list(image.shape[:2])}")
    grey = cv2.transform(image.astype(np.float32), _GREY) if image.ndim == 3 else image * np.float32(1 / 255)
    smooth, usable = _smooth(grey.reshape(image.shape[:2]), float(sigma), mask)
    down = cv2.Sobel(smooth, cv2.CV_32F, 0, 1, borderType=cv2.BORDER_REFLECT)
    across = cv2.Sobel(smooth, cv2.CV_32F, 1, 0, borderType=cv2.BORDER_REFLECT)
    magnitude = cv2.magnitude(down, across)
    return _link(_thin(down, across, magnitude, usable), magnitude)


def _smooth(grey: np.ndarray, sigma: float, mask: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """The blurred image, divided by the blurred validity, and where edges may lie: no hole or border touches it."""
    valid = np.ones(grey.shape, np.uint8) if mask is None else np.equal(mask, 0).astype(np.uint8)
    usable = cv2.erode(valid, np.ones((3, 3), np.uint8), borderType=cv2.BORDER_CONSTANT, borderValue=0)
    if mask is not None:
        grey = np.where(valid, grey, np.float32(0))
    if sigma == 0:
        return grey, usable
    kernel = _kernel(sigma)
    smooth = cv2.sepFilter2D(grey, cv2.CV_32F, kernel, kernel, borderType=cv2.BORDER_CONSTANT)
    if mask is None:  # the validity is then an outer product
        height, width = grey.shape
        smooth *= _border(height, sigma)[:, None]
        smooth *= _border(width, sigma)
        return smooth, usable
    share = cv2.sepFilter2D(
        valid.astype(np.float32), cv2.CV_32F, kernel, kernel, borderType=cv2.BORDER_CONSTANT
    )
    return smooth / (share + np.finfo(np.float32).eps), usable


@functools.lru_cache(maxsize=64)
def _kernel(sigma: float) -> np.ndarray:
    """A Gaussian cut at four sigma."""
    return cv2.getGaussianKernel(2 * int(4 * sigma + 0.5) + 1, sigma, cv2.CV_32F)


@functools.lru_cache(maxsize=256)
def _border(length: int, sigma: float) -> np.ndarray:
    """1 / the share of the kernel that lies inside a line of `length` pixels, at each of them."""
    kernel = _kernel(sigma)[:, 0]
    inside = np.convolve(np.ones(length), kernel, "full")[len(kernel) // 2 :][:length]
    return (1 / inside).astype(np.float32)


def _thin(down: np.ndarray, across: np.ndarray, magnitude: np.ndarray, usable: np.ndarray) -> np.ndarray:
    """uint8 [H,W], 1 where the magnitude is above LOW and no less than its neighbours up and down the gradient.

    A neighbour is interpolated between the pixel straight ahead on the gradient's longer axis and the diagonal one
    that it leans to, in proportion to the shorter part. On whole arrays: most pixels of a photograph are above LOW.
    """
    height, width = magnitude.shape
    lines = np.zeros((height, width), np.uint8)
    if min(height, width) < 3:
        return lines

    def neighbour(y: int, x: int) -> np.ndarray:
        return magnitude[1 + y : height - 1 + y, 1 + x : width - 1 + x]

    own, down, across = neighbour(0, 0), down[1:-1, 1:-1], across[1:-1, 1:-1]
    steepness, flatness = np.abs(down), np.abs(across)
    share = cv2.divide(cv2.min(steepness, flatness), cv2.max(steepness, flatness))
    steep = cv2.compare(steepness, flatness, cv2.CMP_GT)
    falling = np.less(down * across, 0).view(np.uint8)
    falling_steep, falling_flat = falling & steep, falling & ~steep
    keep = np.greater_equal(own, np.float32(LOW)).view(np.uint8) & usable[1:-1, 1:-1]
    ahead, lean = np.empty_like(share), np.empty_like(share)
    for sign in (1, -1):
        ahead[:] = neighbour(0, sign)
        cv2.copyTo(neighbour(sign, 0), steep, ahead)
        lean[:] = neighbour(sign, sign)
        cv2.copyTo(neighbour(sign, -sign), falling_steep, lean)
        cv2.copyTo(neighbour(-sign, sign), falling_flat, lean)
        lean -= ahead
        lean *= share
        lean += ahead
        keep &= cv2.compare(lean, own, cv2.CMP_LE)
    lines[1:-1, 1:-1] = keep  # usable holds 0 and 1: so does keep
    return lines


def _link(lines: np.ndarray, magnitude: np.ndarray) -> np.ndarray:
    """bool [H,W]: the connected lines that have a pixel above HIGH."""
    count, labels = cv2.connectedComponents(lines, connectivity=8, ltype=cv2.CV_32S)
    at = np.flatnonzero(lines.view(bool))
    label = labels.ravel()[at]
    good = np.zeros(count, bool)
    good[label[magnitude.ravel()[at] >= HIGH]] = True
    edges = np.zeros(lines.shape, bool)
    edges.ravel()[at] = good[label]
    return edges


def write_edge_shard(
    shards: Storage,
    entry: dict[str, Any],
    outs: Mapping[float, Storage],
    decode: Callable[[bytes], np.ndarray] = decode_sample,
) -> dict[float, dict[str, Any]]:
    """Edge maps of one shard, a tar of the same name for each sigma in that sigma's storage: the same keys in the same
    order, PNGs of one bit. Each photograph is decoded once.

    Returns {sigma: {name, count, bytes, sha256, photos_sha256}}, for `assemble_edges`. A tar that was made from these
    photographs already is left as it is. Raises ValueError when the shard is not what its entry says.
    """
    name = entry["name"]
    done = {sigma: found for sigma, out in outs.items() if (found := _made(out, entry))}
    if len(done) == len(outs):
        return done
    index, tar = read_index(shards, name), shards.read(name)
    if hashlib.sha256(tar).hexdigest() != entry["sha256"]:
        raise ValueError(f"{name} in {shards.uri} is not what the manifest says: make the shards again")
    with ExitStack() as stack:
        more: dict[float, dict[str, Any]] = {
            sigma: {"photos_sha256": entry["sha256"]} for sigma in outs if sigma not in done
        }
        tars = {s: stack.enter_context(writing_tar(outs[s], name, told)) for s, told in more.items()}
        for key, offset, size in zip(index["keys"], index["offsets"], index["sizes"], strict=True):
            photo = decode(tar[offset : offset + size])
            for sigma, edge_tar in tars.items():
                edge_tar.add(f"{key}.png", encode_edges(canny_edges(photo, sigma)))
        for sigma, edge_tar in tars.items():
            edge_tar.end()
            done[sigma] = {**edge_tar.entry(name), "photos_sha256": entry["sha256"]}
            more[sigma]["entry"] = done[sigma]
    return done


def _made(out: Storage, photos: Mapping[str, Any]) -> dict[str, Any] | None:
    """The entry of an edge tar that is there and is of these photographs."""
    try:
        index = json.loads(out.read(index_name(photos["name"])))
        made: dict[str, Any] = index["entry"]
        same = index["photos_sha256"] == photos["sha256"] and out.size(photos["name"]) == made["bytes"]
    except (MissingKey, ValueError, KeyError, TypeError):
        return None
    return made if same else None


_PNG = b"\x89PNG\r\n\x1a\n"
_PLAIN = struct.pack(">BBBBB", 1, 0, 0, 0, 0)  # one bit, grey, deflate, no interlacing


def encode_edges(edges: np.ndarray) -> bytes:
    """bool [H,W] as a PNG of one bit a pixel, its rows unfiltered: the smallest for lines, and read by `decode_edges`
    with one inflation."""
    height, width = edges.shape
    rows = np.zeros((height, 1 + (width + 7) // 8), np.uint8)
    rows[:, 1:] = np.packbits(edges, axis=1)
    header = struct.pack(">II", width, height) + _PLAIN
    deflate = zlib.compressobj(
        5, zlib.DEFLATED, 15, 9, zlib.Z_FILTERED
    )  # 9 takes ten times as long for one per cent
    body = deflate.compress(rows.tobytes()) + deflate.flush()
    return _PNG + _chunk(b"IHDR", header) + _chunk(b"IDAT", body) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def decode_edges(data: bytes) -> np.ndarray:
    """uint8 [H,W], 1 where there is an edge; ValueError when the map is damaged. Any PNG is read; ours, quickly."""
    if data[:8] == _PNG and data[24:29] == _PLAIN and data[37:41] == b"IDAT":
        width, height = struct.unpack(">II", data[16:24])
        (size,) = struct.unpack(">I", data[33:37])
        with suppress(zlib.error, ValueError):
            rows = np.frombuffer(zlib.decompress(data[41 : 41 + size]), np.uint8).reshape(height, -1)
            if rows.shape[1] == 1 + (width + 7) // 8 and not rows[:, 0].any():
                return np.unpackbits(rows[:, 1:], axis=1, count=width)
    edges = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE) if data else None
    if edges is None:
        raise ValueError("an edge map cannot be decoded: make the edges again")
    return np.minimum(edges, 1)


def assemble_edges(
    parts: Iterable[dict[str, Any]], sigma: float, shards_digest: str, out: Storage
) -> dict[str, Any]:
    """Write edges.json, last, and return it."""
    edges = {"version": 1, "sigma": sigma, "shards_digest": shards_digest, "shards": list(parts)}
    out.write("edges.json", json.dumps(edges, indent=1).encode())
    return edges


def load_edges(edges: Storage, shards_digest: str) -> dict[str, Any]:
    """edges.json; ValueError when there is none, or when it was made from other shards."""
    try:
        found = json.loads(edges.read("edges.json"))
    except MissingKey:
        mend = "make them with `inpaint edges SHARDS --sigma S`"
        raise ValueError(f"{edges.uri} holds no finished edges (edges.json is missing): {mend}") from None
    if found["shards_digest"] != shards_digest:
        raise ValueError(f"the edges in {edges.uri} were made from other shards: make them again")
    return found
