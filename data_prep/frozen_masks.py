"""Frozen mask sets: a tar of PNG masks with a manifest, so that evaluations anywhere use the same masks to the bit.

The members are manifest.json (FrozenManifest) and the masks 000000.png, 000001.png ... in order (one bit per pixel, white =
hole): a webdataset tar. Times and owners are fixed, so that the same masks give the same bytes. The digest is over the
masks' pixels, not over the files: it does not depend on the PNG encoder.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_prep.hole_areas import HOLE_AREA_BANDS, hole_area_band
from data_prep.mask_source import MaskSource
from data_prep.records import RecordError, decode, to_json
from data_prep.storage import MissingKey, Storage, StorageError, open_storage
from data_prep.tars import TarWriter
from data_prep.uris import redact_uri

SUFFIX = ".tar"
MANIFEST_NAME = "manifest.json"
FORMAT = "inpaint frozen masks"
VERSION = 1
FREEZE_HINT = "make one with `inpaint masks freeze KIND --count N --size S --out SET.tar`"
SHORT_DIGEST = 12  # hexadecimal digits in texts


class FrozenSetError(ValueError):
    """A file that is not a frozen mask set, or a damaged one; one line."""


@dataclass(frozen=True)
class FrozenManifest:
    """What a frozen set consists of."""

    format: str
    version: int
    masks: dict[str, dict[str, Any]]
    """kind or folder -> weight and options"""
    count: int
    size: int
    """side in pixels of the square masks"""
    seed: int
    digest: str
    """SHA-256 of the masks' sizes and pixels, see `masks_digest`"""
    bands: dict[str, int]
    """hole-area band in per cent -> number of masks"""
    hole_fractions: tuple[float, ...]
    """of each mask, the fraction of the image that is hole"""

    @property
    def short_digest(self) -> str:
        return self.digest[:SHORT_DIGEST]

    @property
    def kinds(self) -> str:
        """`lama_thick`, or `brush and block`."""
        return " and ".join(self.masks)


@dataclass(frozen=True)
class FrozenMasks(MaskSource):
    """The masks of a frozen set, for evaluations: photograph i gets mask i."""

    uri: str
    manifest: FrozenManifest
    packed: tuple[bytes, ...]
    """bits of each mask (np.packbits)"""

    def sample(self, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
        """Always raises ValueError: random choices are for training."""
        raise ValueError(
            f"{self.uri} is a frozen mask set, which is for evaluation; to train on its masks unpack them into a folder "
            f"(tar xf) and name that"
        )

    def iterate_fixed_set(self, height: int, width: int, count: int, seed: int) -> Iterator[np.ndarray]:
        """The first `count` masks. Raises ValueError, with what to do, if there are fewer or of another size."""
        size = self.manifest.size
        if (height, width) != (size, size):
            raise ValueError(
                f"{self.uri} has masks of {size} x {size} pixels, not {width} x {height} as the photographs: score at "
                f"--size {size} (in recipes data.size), or freeze masks of the photographs' size"
            )
        if count > self.manifest.count:
            raise ValueError(
                f"{self.uri} has {self.manifest.count} masks for {count} photographs: freeze a set of --count {count}, or "
                f"score {self.manifest.count} photographs (--max-photos; in recipes evaluate.max_photos)"
            )
        return (_unpack(bits, size) for bits in self.packed[:count])

    def describe(self) -> str:
        manifest = self.manifest
        return (
            f"{manifest.count} frozen masks of {self.uri} ({manifest.kinds}, seed {manifest.seed}, digest "
            f"{manifest.short_digest})"
        )

    def record(self) -> dict[str, Any]:
        """For the protocol of an evaluation: the manifest without the areas of the single masks."""
        manifest = self.manifest
        return {
            "digest": manifest.digest,
            "masks": manifest.masks,
            "count": manifest.count,
            "size": manifest.size,
            "seed": manifest.seed,
        }


def is_frozen_set(name: str) -> bool:
    """Whether a name in a mask spec means a frozen set: a file, or an object in a bucket, that ends with .tar."""
    return name.lower().endswith(SUFFIX) and not Path(name).is_dir()


def freeze_masks(
    source: MaskSource, masks: Mapping[str, Mapping[str, Any]], count: int, size: int, seed: int, uri: str
) -> tuple[FrozenManifest, bool]:
    """Write `count` masks of `source`, `size` x `size` pixels each, as a frozen set; returns its manifest, and whether it
    was written: a set of the same masks stays as it is.

    `masks` is the spec of the source, which the manifest records. Raises ValueError if the name does not end with .tar,
    or if it is another file already.
    """
    storage, name = _locate(uri)
    pixels, digest, fractions = [], hashlib.sha256(), []
    bands: Counter[str] = Counter()
    for mask in source.iterate_fixed_set(size, size, count, seed):
        _update_digest(digest, mask)
        pixels.append(_encode_png(mask))
        fractions.append(float(mask.mean()))
        bands[hole_area_band(mask)] += 1
    manifest = FrozenManifest(
        format=FORMAT,
        version=VERSION,
        masks={redact_uri(kind): dict(options) for kind, options in masks.items()},
        count=count,
        size=size,
        seed=seed,
        digest=digest.hexdigest(),
        bands={band: bands[band] for band in HOLE_AREA_BANDS if band in bands},
        hole_fractions=tuple(fractions),
    )
    if storage.exists(name):
        with suppress(FrozenSetError):
            if load_frozen_set(uri).manifest == manifest:
                return manifest, False
        raise ValueError(f"{uri} exists and is not this set of masks: remove it, or name another file")
    with storage.open_for_write(name) as file:
        tar = TarWriter(file)
        tar.add(MANIFEST_NAME, json.dumps(to_json(manifest), indent=1).encode() + b"\n")
        for number, png in enumerate(pixels):
            tar.add(_member_name(number), png)
        tar.finish()
    return manifest, True


def load_frozen_set(uri: str) -> FrozenMasks:
    """A frozen set, verified: every mask is decoded and the digest computed. Raises FrozenSetError, in one line, if the
    file is damaged or is not a frozen set, and StorageError if it cannot be read."""
    storage, name = _locate(uri)
    try:
        data = storage.read(name)
    except MissingKey:
        raise FrozenSetError(f"the frozen mask set {uri} does not exist: {FREEZE_HINT}") from None
    except StorageError as error:
        raise StorageError(f"the frozen mask set {uri} cannot be read: {error}") from error
    return _parse(uri, data)


@functools.lru_cache(maxsize=2)
def _parse(uri: str, data: bytes) -> FrozenMasks:
    """Cached: a process that opens a set several times verifies it once."""
    members = _read_members(uri, data)
    if not members or members[0][0] != MANIFEST_NAME:
        raise FrozenSetError(f"{uri} is a tar without {MANIFEST_NAME}, not a frozen mask set: {FREEZE_HINT}")
    try:
        manifest = decode(FrozenManifest, members[0][1], f"{MANIFEST_NAME} of {uri}")
    except RecordError as error:
        raise FrozenSetError(f"{uri} is not a frozen mask set: {error}; {FREEZE_HINT}") from None
    if manifest.format != FORMAT or manifest.version != VERSION:
        raise FrozenSetError(
            f"{uri} has masks in the format {manifest.format!r}, version {manifest.version}; this release reads "
            f"{FORMAT!r}, version {VERSION}"
        )
    if len(members) - 1 != manifest.count or len(manifest.hole_fractions) != manifest.count:
        raise _damaged(uri, f"it has {len(members) - 1} of {manifest.count} masks")
    digest, packed = hashlib.sha256(), []
    for number, (name, png) in enumerate(members[1:]):
        if name != _member_name(number):
            raise _damaged(uri, f"{name} stands in the place of {_member_name(number)}")
        mask = _decode_png(uri, name, png)
        if mask.shape != (manifest.size, manifest.size):
            raise _damaged(uri, f"{name} is not {manifest.size} x {manifest.size} pixels")
        _update_digest(digest, mask)
        packed.append(np.packbits(mask).tobytes())
    if digest.hexdigest() != manifest.digest:
        raise _damaged(
            uri,
            f"its masks have the digest {digest.hexdigest()[:SHORT_DIGEST]}, the manifest {manifest.short_digest}",
        )
    return FrozenMasks(uri, manifest, tuple(packed))


def _read_members(uri: str, data: bytes) -> list[tuple[str, bytes]]:
    """The files of a tar, in order."""
    try:
        tar = tarfile.open(fileobj=io.BytesIO(data), mode="r:")  # noqa: SIM115
    except tarfile.TarError:
        raise FrozenSetError(f"{uri} is not a tar, so not a frozen mask set: {FREEZE_HINT}") from None
    members = []
    try:
        with tar:
            for info in tar:
                file = tar.extractfile(info) if info.isreg() else None
                content = file.read() if file else b""
                if len(content) != info.size:
                    raise _damaged(uri, f"it ends inside {info.name}")
                members.append((info.name, content))
    except tarfile.TarError as error:
        raise _damaged(uri, str(error)) from None
    return members


def _damaged(uri: str, reason: str) -> FrozenSetError:
    return FrozenSetError(
        f"the frozen mask set {uri} is damaged ({reason}): copy it again, or freeze it again"
    )


def masks_digest(masks: Iterable[np.ndarray]) -> str:
    """SHA-256 over the size and pixels of every mask [H,W], in order."""
    digest = hashlib.sha256()
    for mask in masks:
        _update_digest(digest, mask)
    return digest.hexdigest()


def _update_digest(digest: Any, mask: np.ndarray) -> None:
    digest.update(f"{mask.shape[0]}x{mask.shape[1]}\0".encode() + np.packbits(mask).tobytes())


def _encode_png(mask: np.ndarray) -> bytes:
    file = io.BytesIO()
    # settings that Pillow's defaults may change are named
    Image.fromarray(mask * np.uint8(255)).convert("1").save(file, "PNG", optimize=False, compress_level=9)
    return file.getvalue()


def _decode_png(uri: str, name: str, png: bytes) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(png), formats=("PNG",)) as image:
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        raise _damaged(uri, f"{name} is not a readable PNG") from None
    if image.mode != "1":
        raise _damaged(uri, f"{name} is not black and white")
    return np.asarray(image, dtype=np.uint8)


def _unpack(bits: bytes, size: int) -> np.ndarray:
    return np.unpackbits(np.frombuffer(bits, np.uint8), count=size * size).reshape(size, size)


def _member_name(number: int) -> str:
    return f"{number:06d}.png"


def _locate(uri: str) -> tuple[Storage, str]:
    """The storage of a file or object, and its key there."""
    if not uri.lower().endswith(SUFFIX):
        raise ValueError(f"{uri}: the name of a frozen mask set ends with {SUFFIX}")
    folder, _, name = uri.rpartition("/")
    if not name.removesuffix(SUFFIX):
        raise ValueError(f"{uri}: give the frozen mask set a name before {SUFFIX}")
    if not folder:
        folder = "/" if uri.startswith("/") else "."
    return open_storage(folder), name


def frozen_sets(names: Sequence[str]) -> dict[str, FrozenMasks]:
    """{name: set} of the frozen sets among the names of mask sets. Raises as `load_frozen_set`."""
    return {name: load_frozen_set(name) for name in names if is_frozen_set(name)}
