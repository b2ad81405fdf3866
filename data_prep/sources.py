"""Photograph sources: a folder tree, a bucket prefix, a listing file, or photographs in installed packages."""

from __future__ import annotations

import functools
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np

from data_prep.images import decode_photo
from data_prep.left_out import COMPANIONS, LeftOut, exclude_side_files, find_companion
from data_prep.storage import BadKey, Storage, check_key, open_storage

LISTING_SUFFIXES = (".txt", ".lst", ".list", ".flist")  # files with one photograph per line
_CHUNK_BYTES = 1 << 20  # of a listing file, read at once
MIN_TILE_CONTRAST = 10  # grey levels: bundled tiles with a lower standard deviation are not used
_BUNDLED_PHOTOS = {  # photograph -> (package, wheel, file)
    "astronaut": ("skimage", "scikit-image", "data/astronaut.png"),
    "chelsea": ("skimage", "scikit-image", "data/chelsea.png"),
    "china": ("sklearn", "scikit-learn", "datasets/images/china.jpg"),
    "coffee": ("skimage", "scikit-image", "data/coffee.png"),
    "flower": ("sklearn", "scikit-learn", "datasets/images/flower.jpg"),
    "hubble": ("skimage", "scikit-image", "data/hubble_deep_field.jpg"),
    "motorcycle": ("skimage", "scikit-image", "data/motorcycle_left.png"),
    "rocket": ("skimage", "scikit-image", "data/rocket.jpg"),
}


class PhotoSource(ABC):
    """Named photographs, as encoded bytes. Picklable."""

    uri: str

    @abstractmethod
    def list_photos(self, left_out: LeftOut | None = None) -> Iterator[tuple[str, str]]:
        """(name, fingerprint) of every photograph, lazily and always in the same order.

        A changed photograph has another fingerprint (its size, where that is known). Other files of the source are
        added to `left_out`. Raises ValueError if there is no photograph.
        """

    def names(self) -> list[str]:
        """All names, in the order of `list_photos`."""
        return [name for name, _ in self.list_photos()]

    @abstractmethod
    def read(self, name: str) -> bytes:
        """The encoded photograph. Raises StorageError if it cannot be read."""

    def split_group(self, name: str) -> str | None:
        """Group id: photographs of one group go to the same split. None: no group."""
        return None


def open_source(uri: str, tile_size: int = 64, root: str | None = None) -> PhotoSource:
    """`uri` is a folder, s3://bucket/prefix, a listing file in either, or 'bundled' (with tiles of `tile_size` pixels).

    A listing's names are relative to `root`, by default to the listing's own folder.
    """
    if uri == "bundled":
        return BundledSource(tile_size)
    if uri.lower().endswith(LISTING_SUFFIXES) and not Path(uri).is_dir():
        folder, slash, name = uri.rpartition("/")
        storage = open_storage(f"{folder}{slash}" or ".")
        return ListingSource(storage, name, open_storage(root) if root else storage)
    return StorageSource(open_storage(uri))


@dataclass(frozen=True)
class StorageSource(PhotoSource):
    """All files of a folder tree or a bucket prefix, except companions and side files (see left_out.py)."""

    storage: Storage
    uri: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "uri", self.storage.uri)

    def list_photos(self, left_out: LeftOut | None = None) -> Iterator[tuple[str, str]]:
        folder = self.storage.local_path()
        if folder is not None and not folder.is_dir():
            raise ValueError(
                f"data.source {self.uri} is not a folder; give a folder of photographs, s3://..., a listing (.txt), "
                "or 'bundled'"
            )
        left_out = LeftOut() if left_out is None else left_out
        empty = True
        for key, size in exclude_side_files(self.storage.list_user_files(left_out), left_out):
            empty = False
            yield key, str(size)
        if empty:
            detail = f": all of its files are left out, {left_out}" if left_out.total else ""
            raise ValueError(
                f"data.source {self.uri} is empty{detail}; put photographs there or name another folder"
            )

    def read(self, name: str) -> bytes:
        return self.storage.read(name)


@dataclass(frozen=True)
class ListingSource(PhotoSource):
    """The photographs named in a text file, one per line, in the file's order; without blank lines and companions.

    Names are relative to `root`; an absolute path is accepted if it is inside `root`. Reading any other name ('..',
    another absolute path, a scheme such as pipe:) raises BadKey.
    """

    storage: Storage
    listing_key: str
    root: Storage
    uri: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "uri", f"{self.storage.uri}/{self.listing_key}")

    def list_photos(self, left_out: LeftOut | None = None) -> Iterator[tuple[str, str]]:
        if self.storage.size(self.listing_key) is None:
            raise ValueError(f"data.source {self.uri} is not a listing: there is no such file")
        left_out = LeftOut() if left_out is None else left_out
        empty = True
        for line in _read_lines(self.storage, self.listing_key):
            name = line.decode("utf-8", "surrogateescape")
            if find_companion(self._relative_name(name)):
                left_out.add(COMPANIONS, name)
            elif name:
                empty = False
                yield name, ""
        if empty:
            detail = f": all of its files are left out, {left_out}" if left_out.total else ""
            raise ValueError(f"data.source {self.uri} names no photograph{detail}; write one name per line")

    def _relative_name(self, name: str) -> str:
        return name.removeprefix(f"{self.root.uri}/")

    def read(self, name: str) -> bytes:
        key = self._relative_name(name)
        if ":" in key.split("/")[0] and self.root.size(key) is None:
            raise BadKey(
                f"{name!r} is refused: the names in a listing must be paths relative to {self.root.uri}"
            )
        return self.root.read(check_key(key))


@dataclass(frozen=True)
class BundledSource(PhotoSource):
    """Colour photographs inside the scikit-image and scikit-learn wheels, cut into tiles at scales 1 and 1/2.

    Names are photograph/scale/row-column. A group is a block of 2 x 2 tiles together with the half-scale tile of the
    same area, so that no area is in two splits. Tiles without contrast (sky, black space) are not used: there is
    nothing in them to learn, and any smooth completion is right.
    """

    tile_size: int = 64
    uri: str = "bundled"

    def __post_init__(self) -> None:
        if not 16 <= self.tile_size <= 256:
            raise ValueError(
                f"data.tile {self.tile_size}: the bundled photographs give tiles of 16 to 256 pixels"
            )

    def list_photos(self, left_out: LeftOut | None = None) -> Iterator[tuple[str, str]]:
        for photo in sorted(_BUNDLED_PHOTOS):
            for scale in ("full", "half"):
                contrast = _tile_contrast(photo, scale == "half", self.tile_size)
                tiles = np.argwhere(contrast >= MIN_TILE_CONTRAST)
                yield from (
                    (name, "") for name in sorted(f"{photo}/{scale}/{y:03d}-{x:03d}" for y, x in tiles)
                )

    def read(self, name: str) -> bytes:
        photo, scale, y, x = _parse_tile_name(name)
        pixels = bundled_photo(photo, scale == 2)
        size = self.tile_size
        tile = pixels[y * size : (y + 1) * size, x * size : (x + 1) * size]
        return cv2.imencode(".png", tile[..., ::-1])[1].tobytes()

    def split_group(self, name: str) -> str:
        photo, scale, y, x = _parse_tile_name(name)
        return f"{photo}/{y * scale // 2}-{x * scale // 2}"


def _read_lines(storage: Storage, key: str) -> Iterator[bytes]:
    """The lines of a text file, read in chunks."""
    size, remainder = storage.size(key) or 0, b""
    for start in range(0, size, _CHUNK_BYTES):
        chunk = storage.read_range(key, start, min(_CHUNK_BYTES, size - start))
        if start == 0:
            chunk = chunk.removeprefix(b"\xef\xbb\xbf")  # byte order mark
        *lines, remainder = (remainder + chunk).split(b"\n")
        yield from (line.rstrip(b"\r") for line in lines)
    yield remainder.rstrip(b"\r")


def _parse_tile_name(name: str) -> tuple[str, int, int, int]:
    """(photograph, scale denominator, row, column)."""
    photo, scale, position = name.split("/")
    y, x = map(int, position.split("-"))
    return photo, 2 if scale == "half" else 1, y, x


@functools.lru_cache(maxsize=64)
def _tile_contrast(name: str, half: bool, tile_size: int) -> np.ndarray:
    """Standard deviation of the grey levels of each tile, float [rows,columns]."""
    photo = bundled_photo(name, half)
    rows, columns = (side // tile_size for side in photo.shape[:2])
    gray = photo[: rows * tile_size, : columns * tile_size].mean(2)
    return gray.reshape(rows, tile_size, columns, tile_size).std((1, 3))


@functools.cache
def bundled_names() -> tuple[str, ...]:
    """The bundled photographs whose package is installed here."""
    packages = {package for package, _, _ in _BUNDLED_PHOTOS.values()}
    installed = {package for package in packages if importlib.util.find_spec(package)}
    return tuple(name for name, (package, _, _) in sorted(_BUNDLED_PHOTOS.items()) if package in installed)


@functools.lru_cache(maxsize=16)
def bundled_photo(photo: str, half: bool = False) -> np.ndarray:
    """uint8 RGB [H,W,3]; `half` halves both sides by averaging squares of 2 x 2 pixels."""
    if half:
        full = bundled_photo(photo)
        height, width = full.shape[0] // 2, full.shape[1] // 2
        return cv2.resize(full[: 2 * height, : 2 * width], (width, height), interpolation=cv2.INTER_AREA)
    package, wheel, file = _BUNDLED_PHOTOS[photo]
    spec = importlib.util.find_spec(package)  # located, not imported: skimage takes a second
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"data.source bundled needs the package {wheel}: pip install {wheel}")
    return decode_photo(Path(spec.submodule_search_locations[0], file).read_bytes())
