"""The photographs of a session: files with random names in its folder, with mask, lines and a view for the browser."""

from __future__ import annotations

import io
import re
import secrets
import shutil
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import HTTPException
from PIL import Image

from data_prep.images import PhotoError, open_image
from pipelines.inference.fill_inputs import read_hole
from pipelines.inference.photo_file import PhotoFile, read_photo_file
from pipelines.studio.photo import Photo
from pipelines.studio.sessions import Session
from pipelines.studio.uploads import FORMATS, check_upload

MAX_PHOTOS = 12  # of a session; the one used least recently goes first
MAX_FOLDER_BYTES = 2 * 2**30  # of a session
VIEW_PNG_PIXELS = 4_000_000
"""Larger views are JPEGs of quality 95 without chroma subsampling: a PNG of 24 megapixels takes seconds and 40 MB, and
the difference is a few levels at most. Downloads never pass through a view."""
PAGE_WORDS = (
    (r"; --invert-mask swaps it|; try --invert-mask", "; Invert swaps it"),
    (r"\bthe (mask|drawing) the \1\b", r"the \1"),
    (r"; choose one with --hole VALUE", ": save the mask with white for the hole and black for the rest"),
    (r"; --max-tile-size (\d+) downscales it", r"; the option Largest tile, \1 px, downscales it"),
    (r"--blend hides it", "the option Blend the seam hides it"),
    (r"; write a PNG to keep them: --out \S+", "; download a PNG to keep them"),
    (r"--(?:out|edges) \S+: ", ""),
    (r": choose one with --frame N, 1 to (\d+); only that one is written", r": choose one, 1 to \1"),
)
"""The command line's words -> the page's."""

_decoding = threading.BoundedSemaphore(2)  # bounds the memory of decoded photographs


class PhotoCache:
    """The photographs decoded last, so that brush strokes do not decode them again."""

    def __init__(self, size: int = 2) -> None:
        self._size, self._lock = size, threading.Lock()
        self._photos: OrderedDict[str, PhotoFile] = OrderedDict()

    def put(self, photo_id: str, file: PhotoFile) -> None:
        with self._lock:
            self._photos[photo_id] = file
            while len(self._photos) > self._size:
                self._photos.popitem(last=False)

    def get(self, photo: Photo) -> PhotoFile:
        with self._lock:
            if file := self._photos.get(photo.id):
                self._photos.move_to_end(photo.id)
                return file
        with _decoding:
            file = read_photo_file(photo.path, photo.frame)
        self.put(photo.id, file)
        return file

    def rgb(self, photo: Photo, hole: np.ndarray) -> np.ndarray:
        """uint8 [H,W,3], as `prepare_fill` makes it for this hole."""
        file = self.get(photo)
        if not file.pixels.has_open_range:
            return file.rgb
        with _decoding:
            own = read_photo_file(photo.path, photo.frame)
        own.fit_range(~hole)
        return own.rgb


cache = PhotoCache()


def add_photo(session: Session, data: bytes, name: str, max_pixels: int, frame: int | None = None) -> Photo:
    """Check, decode and keep a photograph. HTTPException or ValueError in one line if it cannot be used."""
    header = check_upload(data, name, max_pixels, frame)
    if frame is None and header.frames > 1 and header.word != "photograph":
        frame = 1
    photo_id = secrets.token_urlsafe(16)
    folder = session.folder / photo_id
    folder.mkdir(mode=0o700)
    path = folder / f"photo.{FORMATS[header.format]}"
    try:
        path.write_bytes(data)
        with _decoding, page_words({path: name}):
            file = read_photo_file(path, frame)
        view = _write_view(file.rgb, folder / "view", file.metadata.icc_profile if _is_rgb(file) else None)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    height, width = file.rgb.shape[:2]
    photo = Photo(
        *(photo_id, name, folder, path, width, height, header.format, _describe_mode(file), file.notes),
        *(header.frames, frame, view),
    )
    cache.put(photo_id, file)
    with session.lock:
        session.photos[photo_id] = photo
        _drop_old(session)
    return photo


def find_photo(session: Session, photo_id: str) -> Photo:
    """The session's photograph, or 404."""
    with session.lock:
        photo = session.photos.get(photo_id)
        if photo is None:
            raise HTTPException(
                404, "there is no such photograph: it was dropped for newer ones; load it again"
            )
        session.photos.move_to_end(photo_id)
        return photo


def _drop_old(session: Session) -> None:
    while len(session.photos) > MAX_PHOTOS or (
        len(session.photos) > 1 and _folder_bytes(session.folder) > MAX_FOLDER_BYTES
    ):
        _, old = session.photos.popitem(last=False)
        shutil.rmtree(old.folder, ignore_errors=True)


def _folder_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except OSError:  # a result that is replaced just now
            continue
    return total


def _is_rgb(file: PhotoFile) -> bool:
    return file.pixels.color_space == "rgb"


def _describe_mode(file: PhotoFile) -> str:
    values, space = file.pixels.values, file.pixels.color_space
    bits = 1 if values.dtype.kind == "b" else 8 * values.itemsize
    kind = "float" if values.dtype.kind == "f" else "bit" if bits == 1 else "bits"
    name = {"grey": "grey", "rgb": "RGB", "cmyk": "CMYK", "ycbcr": "YCbCr", "lab": "Lab"}.get(space, space)
    extra = f" + {' + '.join(file.pixels.extra_channels)}" if file.pixels.extra_channels else ""
    return f"{name}{extra}, {bits} {kind}"


def _write_view(rgb: np.ndarray, stem: Path, icc_profile: bytes | None) -> Path:
    """Write a PNG, or for a large photograph a JPEG, with the profile of its colours; returns its path."""
    image = Image.fromarray(rgb)
    options: dict[str, Any] = {"icc_profile": icc_profile} if icc_profile else {}
    if rgb.shape[0] * rgb.shape[1] <= VIEW_PNG_PIXELS or max(rgb.shape) > 65535:
        image.save(stem.with_suffix(".png"), compress_level=1, **options)
        return stem.with_suffix(".png")
    image.save(stem.with_suffix(".jpg"), quality=95, subsampling=0, **options)
    return stem.with_suffix(".jpg")


def view_of_file(path: Path, stem: Path) -> Path:
    """Write the view of a filled photograph; returns its path."""
    file = read_photo_file(path)
    return _write_view(file.rgb, stem, file.metadata.icc_profile if _is_rgb(file) else None)


def read_painted(data: bytes, photo: Photo, role: str, max_pixels: int) -> np.ndarray:
    """bool [H,W]: what is white and opaque in a PNG at the photograph's size, as the page paints it; else 400."""
    header = check_upload(data, role, max_pixels)
    if (header.width, header.height) != (photo.width, photo.height):
        raise HTTPException(
            400,
            f"{role} is {header.width} x {header.height} px, the photograph {photo.width} x {photo.height}: "
            "they must be the same",
        )
    try:
        with open_image(data) as image:
            alpha = (
                np.asarray(image.convert("RGBA").getchannel("A"))
                if image.mode in ("RGBA", "LA", "P")
                else None
            )
            painted = np.asarray(image.convert("L")) > 127
    except PhotoError as error:
        raise HTTPException(400, f"{role} cannot be read: {error}") from None
    return painted if alpha is None else painted & (alpha > 127)


def write_mask(photo: Photo, hole: np.ndarray) -> float:
    """Keep the hole, bool [H,W]; returns its area in percent."""
    with photo.lock:
        _write_bits(photo.mask, hole)
        photo.hole_percent = round(100 * float(hole.mean()), 2)
        return photo.hole_percent


def write_lines(photo: Photo, lines: np.ndarray | None) -> None:
    """Keep the drawn lines, bool [H,W]; None or nothing drawn removes them."""
    with photo.lock:
        if lines is None or not lines.any():
            photo.lines.unlink(missing_ok=True)
        else:
            _write_bits(photo.lines, lines)


def _write_bits(path: Path, values: np.ndarray) -> None:
    temporary = path.with_suffix(".part")
    Image.fromarray(values).save(temporary, "PNG")
    temporary.replace(path)  # a fill that reads it sees the old or the new one


def read_mask(photo: Photo) -> np.ndarray:
    """The hole, bool [H,W]; nothing if no mask was painted."""
    with photo.lock:
        if not photo.mask.exists():
            return np.zeros((photo.height, photo.width), bool)
        with Image.open(photo.mask) as image:
            return np.asarray(image.convert("L")) > 127


def read_mask_file(
    photo: Photo, data: bytes, name: str, max_pixels: int
) -> tuple[np.ndarray, list[str], list[str]]:
    """(hole, notes, warnings) of any mask file, read as `inpaint fill` reads it."""
    header = check_upload(data, name, max_pixels)
    path = photo.folder / f"{secrets.token_hex(8)}.{FORMATS[header.format]}"
    notes: list[str] = []
    warnings: list[str] = []
    try:
        path.write_bytes(data)
        with page_words({path: name}):
            hole = read_hole(path, cache.get(photo), None, 0, photo.frame, notes, warnings, None)
    finally:
        path.unlink(missing_ok=True)
    return (
        hole,
        [for_page(text, {path: name}) for text in notes],
        [for_page(text, {path: name}) for text in warnings],
    )


def new_results_folder(photo: Photo) -> Path:
    """A folder for the files of one fill; it goes with the photograph."""
    folder = photo.folder / secrets.token_hex(8)
    folder.mkdir(mode=0o700)
    return folder


def copy_for_job(path: Path, folder: Path) -> Path:
    """Copy a mask or a drawing, which may change before the job reads it."""
    return Path(shutil.copyfile(path, folder / path.name))


def edges_png(edges: np.ndarray) -> bytes:
    """A PNG, transparent but for the edges of bool [H,W]."""
    image = Image.fromarray(edges.astype(np.uint8)).convert("P")
    image.putpalette([0, 0, 0, 255, 45, 149])
    file = io.BytesIO()
    image.save(file, "PNG", transparency=0, bits=1, compress_level=1)
    return file.getvalue()


def for_page(text: str, names: dict[Path, str]) -> str:
    """A message of the command line in the page's words, with shown names in place of paths."""
    for path, name in names.items():
        text = text.replace(str(path), name).replace(path.name, name)
    for pattern, words in PAGE_WORDS:
        text = re.sub(pattern, words, text)
    return text


@contextmanager
def page_words(names: dict[Path, str]) -> Iterator[None]:
    """Turn a ValueError of the block, written for the command line, into 400 in the page's words."""
    try:
        yield
    except ValueError as error:
        raise HTTPException(400, for_page(str(error), names)) from error
