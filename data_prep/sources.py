"""Where photographs come from: a folder tree, a bucket prefix, a listing, or the packages installed here; and their
decoding."""

from __future__ import annotations

import functools
import importlib.util
import io
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from data_prep.storage import BadKey, Storage, check_key, open_storage

LISTINGS = (".txt", ".lst", ".list", ".flist")  # endings of files that name a photograph a line
_PIECE = 1 << 20  # bytes of a listing that are read at once
MAX_PIXELS = 1 << 27  # 134 megapixels: above every camera, below what fills a worker's memory
MIN_SIDE = 8  # pixels
ORIENTATION = 0x0112  # EXIF's tag
FLAT = 10  # grey levels: the standard deviation under which a bundled tile shows nothing
_FORMATS = [
    "JPEG",
    "MPO",
    "PNG",
    "WEBP",
    "TIFF",
    "BMP",
    "GIF",
    "PPM",
    "JPEG2000",
    "AVIF",
    "TGA",
]  # not EPS: it runs a program
_BUNDLED = {  # photograph -> (package, wheel, file)
    "astronaut": ("skimage", "scikit-image", "data/astronaut.png"),
    "chelsea": ("skimage", "scikit-image", "data/chelsea.png"),
    "china": ("sklearn", "scikit-learn", "datasets/images/china.jpg"),
    "coffee": ("skimage", "scikit-image", "data/coffee.png"),
    "flower": ("sklearn", "scikit-learn", "datasets/images/flower.jpg"),
    "hubble": ("skimage", "scikit-image", "data/hubble_deep_field.jpg"),
    "motorcycle": ("skimage", "scikit-image", "data/motorcycle_left.png"),
    "rocket": ("skimage", "scikit-image", "data/rocket.jpg"),
}
# `max_pixels` decides here, before anything is decoded
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class PhotoError(ValueError):
    """Why these bytes are no usable photograph."""


class Source(ABC):
    """Named photographs, as encoded bytes. Picklable."""

    uri: str

    @abstractmethod
    def listing(self) -> Iterator[tuple[str, str]]:
        """(name, mark) of every photograph, always in the same order, as they are found. Another mark (its size, where
        that is known) tells a changed photograph. ValueError when there is none."""

    def names(self) -> list[str]:
        """Every name, in the listing's order."""
        return [name for name, _ in self.listing()]

    @abstractmethod
    def read(self, name: str) -> bytes:
        """The encoded photograph; StorageError when it cannot be read."""

    def group(self, name: str) -> str | None:
        """What must stay in one split with this photograph, or None when it stands alone."""
        return None


def open_source(uri: str, tile: int = 64, root: str | None = None) -> Source:
    """`uri` is a folder, s3://bucket/prefix, a listing file in either, or 'bundled' (then `tile` is the side of its
    tiles in pixels). A listing's names are relative to `root`, or to the listing's own folder."""
    if uri == "bundled":
        return BundledSource(tile)
    if uri.lower().endswith(LISTINGS) and not Path(uri).is_dir():
        folder, slash, name = uri.rpartition("/")
        place = open_storage(f"{folder}{slash}" or ".")
        return ListingSource(place, name, open_storage(root) if root else place)
    return StorageSource(open_storage(uri))


@dataclass(frozen=True)
class StorageSource(Source):
    """Every file of a folder tree or a bucket prefix."""

    storage: Storage
    uri: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "uri", self.storage.uri)

    def listing(self) -> Iterator[tuple[str, str]]:
        folder = self.storage.path()
        if folder is not None and not folder.is_dir():
            raise ValueError(
                f"data.source {self.uri} is no folder; give a folder of photographs, s3://..., a listing (.txt), "
                "or 'bundled'"
            )
        empty = True
        for key, size in self.storage.list():
            empty = False
            yield key, str(size)
        if empty:
            raise ValueError(f"data.source {self.uri} is empty; put photographs there or name another folder")

    def read(self, name: str) -> bytes:
        return self.storage.read(name)


@dataclass(frozen=True)
class ListingSource(Source):
    """The photographs that a text file names, one a line, in the file's order; blank lines do not count.

    Names are relative to `root`; an absolute one counts where it leads into `root`. What is no plain name inside it
    ('..', another absolute path, a scheme such as pipe:) is refused when it is read.
    """

    storage: Storage
    file: str
    root: Storage
    uri: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "uri", f"{self.storage.uri}/{self.file}")

    def listing(self) -> Iterator[tuple[str, str]]:
        if self.storage.size(self.file) is None:
            raise ValueError(f"data.source {self.uri} is no listing: there is no such file")
        empty = True
        for line in _lines(self.storage, self.file):
            if line:
                empty = False
                yield line.decode("utf-8", "surrogateescape"), ""
        if empty:
            raise ValueError(f"data.source {self.uri} names no photograph; write one name a line")

    def read(self, name: str) -> bytes:
        inside = name.removeprefix(f"{self.root.uri}/")
        if ":" in inside.split("/")[0] and self.root.size(inside) is None:
            raise BadKey(f"{name!r} is refused: a listing holds plain names relative to {self.root.uri}")
        return self.root.read(check_key(inside))


@dataclass(frozen=True)
class BundledSource(Source):
    """Colour photographs inside the scikit-image and scikit-learn wheels, cut into tiles at scales 1 and 1/2.

    Names are photograph/scale/row-column. A group is a block of 2 x 2 tiles: the half-scale tile that shows
    the same place is in it too, so no place is in two splits. Tiles without contrast (sky, black space) are left out:
    there is nothing in them to learn, and any smooth fill is right.
    """

    tile: int = 64
    uri: str = "bundled"

    def __post_init__(self) -> None:
        if not 16 <= self.tile <= 256:
            raise ValueError(f"data.tile {self.tile}: the bundled photographs give tiles of 16 to 256 pixels")

    def listing(self) -> Iterator[tuple[str, str]]:
        for photo in sorted(_BUNDLED):
            for scale in ("full", "half"):
                shown = np.argwhere(_contrast(photo, scale == "half", self.tile) >= FLAT)
                yield from (
                    (name, "") for name in sorted(f"{photo}/{scale}/{y:03d}-{x:03d}" for y, x in shown)
                )

    def read(self, name: str) -> bytes:
        photo, scale, y, x = _parts(name)
        pixels = bundled_photo(photo, scale == 2)
        tile = pixels[y * self.tile : (y + 1) * self.tile, x * self.tile : (x + 1) * self.tile]
        return cv2.imencode(".png", tile[..., ::-1])[1].tobytes()

    def group(self, name: str) -> str:
        photo, scale, y, x = _parts(name)
        return f"{photo}/{y * scale // 2}-{x * scale // 2}"


def _lines(storage: Storage, key: str) -> Iterator[bytes]:
    """A text file's lines, a piece of it in memory at a time."""
    size, rest = storage.size(key) or 0, b""
    for start in range(0, size, _PIECE):
        piece = storage.read_range(key, start, min(_PIECE, size - start))
        *whole, rest = (rest + (piece if start else piece.removeprefix(b"\xef\xbb\xbf"))).split(b"\n")
        yield from (line.rstrip(b"\r") for line in whole)
    yield rest.rstrip(b"\r")


def _parts(name: str) -> tuple[str, int, int, int]:
    photo, scale, place = name.split("/")
    y, x = map(int, place.split("-"))
    return photo, 2 if scale == "half" else 1, y, x


@functools.lru_cache(maxsize=64)
def _contrast(name: str, half: bool, tile: int) -> np.ndarray:
    """Standard deviation of the grey levels of each tile [rows,columns]."""
    photo = bundled_photo(name, half)
    rows, columns = (side // tile for side in photo.shape[:2])
    grey = photo[: rows * tile, : columns * tile].mean(2)
    return grey.reshape(rows, tile, columns, tile).std((1, 3))


@functools.lru_cache(maxsize=16)
def bundled_photo(photo: str, half: bool = False) -> np.ndarray:
    """uint8 [H,W,3]; `half` halves both sides by averaging squares of 2 x 2 pixels."""
    if half:
        full = bundled_photo(photo)
        height, width = full.shape[0] // 2, full.shape[1] // 2
        return cv2.resize(full[: 2 * height, : 2 * width], (width, height), interpolation=cv2.INTER_AREA)
    package, wheel, file = _BUNDLED[photo]
    spec = importlib.util.find_spec(package)  # found, not imported: skimage takes a second
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"data.source bundled needs the package {wheel}: pip install {wheel}")
    return decode_photo(Path(spec.submodule_search_locations[0], file).read_bytes())


def decode_photo(data: bytes, max_pixels: int = MAX_PIXELS, short_side: int | None = None) -> np.ndarray:
    """Any photograph as uint8 RGB [H,W,3], upright, transparency on white, 16 bits scaled to 8.

    With `short_side`, a JPEG whose short side is far larger may be decoded at 1/2, 1/4 or 1/8 of its size
    (never below twice `short_side`). Raises PhotoError with the reason.
    """
    return decode_image(data, to_rgb, MIN_SIDE, max_pixels, short_side)


def decode_image(
    data: bytes,
    convert: Callable[[Image.Image], np.ndarray],
    min_side: int = 1,
    max_pixels: int = MAX_PIXELS,
    short_side: int | None = None,
) -> np.ndarray:
    """What `convert` makes of an upright image; whatever is wrong with the bytes is a PhotoError."""
    if not data:
        raise PhotoError("empty file (0 bytes)")
    try:
        with Image.open(io.BytesIO(data), formats=_known_formats()) as photo:
            width, height = photo.size
            if width * height > max_pixels:
                raise PhotoError(
                    f"gigantic: {width} x {height} is more than {max_pixels} pixels (data.max_pixels)"
                )
            if min(width, height) < min_side:
                raise PhotoError(f"too small: {width} x {height}; at least {min_side} pixels a side")
            if short_side:
                wanted = 2 * short_side / min(width, height)
                photo.draft(None, (int(width * wanted) + 1, int(height * wanted) + 1))
            if convert is to_rgb and (pixels := _plain_jpeg(data, photo, width)) is not None:
                return pixels
            ImageOps.exif_transpose(photo, in_place=True)
            return convert(photo)
    except PhotoError:
        raise
    except UnidentifiedImageError:
        raise PhotoError("not an image in a known format") from None
    except Image.DecompressionBombError:
        raise PhotoError("gigantic: more pixels than can be decoded safely") from None
    except MemoryError:
        raise PhotoError("gigantic: no memory to decode it") from None
    except Exception as error:  # damaged files make the decoders raise nearly anything
        first = (str(error).splitlines() or [""])[0]
        raise PhotoError(f"damaged or truncated: {first or type(error).__name__}") from error


_REDUCED = {
    1: 0,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}


def _plain_jpeg(data: bytes, photo: Image.Image, width: int) -> np.ndarray | None:
    """The same pixels from OpenCV, whose way from the decoder to an array is a quarter shorter: uint8 [H,W,3] at the
    size that `photo` was drafted to. None for what is no upright RGB or grey JPEG, and for one that is cut (OpenCV
    would fill it up in silence)."""
    if photo.format != "JPEG" or photo.mode not in ("RGB", "L"):
        return None
    flag = _REDUCED.get(round(width / photo.width))
    if flag is None or photo.getexif().get(ORIENTATION, 1) != 1 or data.rfind(b"\xff\xd9") < _scan(data):
        return None
    flags = (flag or cv2.IMREAD_COLOR_RGB) | cv2.IMREAD_IGNORE_ORIENTATION
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    if pixels is None or pixels.shape != (photo.height, photo.width, 3):
        return None
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB, dst=pixels) if flag else pixels


def _scan(data: bytes) -> int:
    """Where a JPEG's own scan begins: a thumbnail, which ends as the photograph does, lies in a segment before it."""
    at = 2
    while data[at : at + 1] == b"\xff" and data[at + 1] != 0xDA:
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return at


def suffix_of(data: bytes) -> str:
    """The usual ending of an image file's format, such as jpg. PhotoError when it is none that is known."""
    try:
        with Image.open(io.BytesIO(data), formats=_known_formats()) as photo:
            name = str(photo.format).lower()
    except Exception as error:
        raise PhotoError("not an image in a known format") from error
    return {"jpeg": "jpg", "mpo": "jpg", "tiff": "tif", "jpeg2000": "jp2"}.get(name, name)


@functools.cache
def _known_formats() -> list[str]:
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


def has_alpha(photo: Image.Image) -> bool:
    return photo.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in photo.info


def to_rgb(photo: Image.Image) -> np.ndarray:
    """uint8 RGB [H,W,3] of an image of any mode."""
    if photo.mode[0] in "IF":
        grey = np.asarray(photo, np.float64)
        steps = (1, 255, 65535) if photo.mode == "F" else (255, 65535) if photo.mode == "I" else (65535,)
        top = next(
            (step for step in steps if grey.max() <= step), 65535
        )  # the modes do not tell how deep they are
        return np.repeat(np.clip(grey * (255 / top) + 0.5, 0, 255).astype(np.uint8)[..., None], 3, axis=2)
    if has_alpha(photo):
        photo = photo.convert("RGBA")
        photo = Image.alpha_composite(Image.new("RGBA", photo.size, "white"), photo)
    return np.asarray(photo if photo.mode == "RGB" else photo.convert("RGB"))
