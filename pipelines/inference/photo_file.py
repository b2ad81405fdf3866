"""Read a photograph of any format, mode and bit depth, upright, with its metadata."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from data_prep.images import MIN_SIDE, PhotoError, check_size, has_alpha, open_image
from pipelines.inference import tiff
from pipelines.inference.metadata import Metadata, read_image_metadata, read_page_metadata
from pipelines.inference.pixels import PILLOW_MODES, Pixels

Transpose = Image.Transpose
EXIF_TRANSPOSES = {  # EXIF orientation -> transpose that makes the pixels upright
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
ARRAY_TRANSPOSES: dict[Transpose, Callable[[np.ndarray], np.ndarray]] = {
    Transpose.FLIP_LEFT_RIGHT: lambda values: values[:, ::-1],
    Transpose.ROTATE_180: lambda values: values[::-1, ::-1],
    Transpose.FLIP_TOP_BOTTOM: lambda values: values[::-1],
    Transpose.TRANSPOSE: lambda values: values.swapaxes(0, 1),
    Transpose.ROTATE_270: lambda values: np.rot90(values, -1),
    Transpose.TRANSVERSE: lambda values: values[::-1, ::-1].swapaxes(0, 1),
    Transpose.ROTATE_90: lambda values: np.rot90(values),
}
AXIS_SWAPS = {Transpose.TRANSPOSE, Transpose.ROTATE_270, Transpose.TRANSVERSE, Transpose.ROTATE_90}
SINGLE_PHOTO_FORMATS = {"MPO"}  # further frames are a preview or the other eye
PNG_COLOR_TYPES = {2: "rgb", 4: "grey", 6: "rgb"}  # PNG color types whose 16 bits Pillow cuts to 8


@dataclass
class PhotoFile:
    """A photograph as model input, and with the pixels and metadata to write back."""

    rgb: np.ndarray
    """uint8 [H,W,3], upright, composed on white: the model's input."""
    pixels: Pixels
    """The file's own values, which are written outside of the hole."""
    metadata: Metadata
    transpose: Image.Transpose | None = None
    """The transpose that made the file's pixels upright."""
    frame_count: int = 1
    """Frames in the file; this is one of them."""
    notes: list[str] = field(default_factory=list)

    def fit_range(self, known: np.ndarray) -> None:
        """If the data type does not define black and white, set them from the known pixels only (bool [H,W])."""
        if self.pixels.has_open_range:
            self.pixels.fit_range(known)
            self.rgb = self.pixels.model_rgb()


def read_photo_file(path: Path, frame: int | None = None) -> PhotoFile:
    """Read any image file that `decode_photo` reads, and more kinds of TIFF.

    `frame`, from 1, selects a frame or page; None is for files with one. ValueError in one line names file and reason.
    """
    data = read_file(path, "photograph")
    try:
        numbers, word = list_frames(data)
        number = _select_frame(f"{path}", numbers, word, frame)
        photo = _read_tiff_page(data, number) if tiff.is_tiff(data) else _read_image(data, number)
    except PhotoError as error:
        raise ValueError(f"{path} cannot be read as a photograph: {error}") from None
    photo.frame_count = len(numbers)
    if photo.transpose is not None:
        photo.notes.append("the photograph is turned upright, following its EXIF orientation")
    if len(numbers) > 1:
        photo.notes.append(f"{word} {frame or 1} of {len(numbers)} is filled; the others are not written")
    return photo


def _read_tiff_page(data: bytes, number: int) -> PhotoFile:
    metadata = read_page_metadata(data, tiff.page_offset(data, number))
    transpose = EXIF_TRANSPOSES.get(metadata.orientation)
    notes: list[str] = []
    pixels = tiff.read_page(data, number)
    if pixels is None:
        with open_image(data) as image:
            image.seek(number)
            image.load()  # Pillow makes a TIFF upright itself
            pixels, notes = _pillow_pixels(image)
    else:
        pixels.values = _transpose(pixels.values, transpose)
    return _make_photo_file(pixels, metadata, transpose, notes)


def _read_image(data: bytes, number: int) -> PhotoFile:
    """A frame of any format but TIFF."""
    with open_image(data) as image:
        image.seek(number)
        image.load()
        metadata = read_image_metadata(image, data)
        transpose = EXIF_TRANSPOSES.get(metadata.orientation)
        notes: list[str] = []
        pixels = _decode_16_bit(image, data, number)
        if pixels is None:
            pixels, notes = _pillow_pixels(image)
    pixels.values = _transpose(pixels.values, transpose)
    return _make_photo_file(pixels, metadata, transpose, notes)


def _make_photo_file(
    pixels: Pixels, metadata: Metadata, transpose: Transpose | None, notes: list[str]
) -> PhotoFile:
    height, width = pixels.values.shape[:2]
    check_size(width, height, MIN_SIDE)
    metadata.axes_swapped = transpose in AXIS_SWAPS
    return PhotoFile(pixels.model_rgb(), pixels, metadata, transpose, 1, [*notes, *metadata.notes])


def _pillow_pixels(image: Image.Image) -> tuple[Pixels, list[str]]:
    """The pixels, and notes, of an image that Pillow decodes without loss."""
    mode = image.mode
    notes: list[str] = []
    if mode[0] in "IF":
        values = np.asarray(image)
        values = values.astype(values.dtype.newbyteorder("="))[..., None]
        if mode == "I" and image.format == "PPM":
            values = values.astype(np.uint16)
        transparent_value = image.info.get("transparency")
        if isinstance(transparent_value, int) and values.dtype == np.uint16:
            alpha = np.where(values == transparent_value, np.uint16(0), np.uint16(65535))
            return Pixels(np.concatenate([values, alpha], axis=2), "grey", ("alpha",)), notes
        return Pixels(values, "grey"), notes
    is_gray = mode in ("LA", "La", "L", "1")
    if mode in ("P", "PA"):
        is_gray = _is_gray(image)
        if not is_gray:
            notes.append("palette colours are saved as RGB, so that the fill is not limited to the palette")
    if has_alpha(image):
        values = np.array(image.convert("RGBA"))
        if is_gray:
            values = np.ascontiguousarray(values[..., [0, 3]])
        return Pixels(values, "grey" if is_gray else "rgb", ("alpha",)), notes
    if is_gray and mode != "1":
        return Pixels(np.array(image.convert("L"))[..., None], "grey"), notes
    if mode == "1":
        return Pixels(np.array(image)[..., None], "grey"), notes
    color_space = next((name for name, pillow_mode in PILLOW_MODES.items() if pillow_mode == mode), "rgb")
    values = np.array(image if mode == PILLOW_MODES[color_space] else image.convert("RGB"))
    return Pixels(values[..., None] if values.ndim == 2 else values, color_space), notes


def _is_gray(image: Image.Image) -> bool:
    """Whether all colours of a palette are gray."""
    red, green, blue = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3).T
    return bool((red == green).all() and (green == blue).all())


def _decode_16_bit(image: Image.Image, data: bytes, number: int) -> Pixels | None:
    """Decode with OpenCV a photograph of more than 8 bits per channel that Pillow would cut to 8; None for others."""
    file_format, max_value = image.format, 0
    if file_format == "PNG" and data[24] == 16 and data[25] in PNG_COLOR_TYPES:
        max_value = 65535
    elif file_format == "PPM" and image.mode == "RGB" and data[:2] == b"P6":
        max_value = _ppm_max_value(data)
    elif (
        file_format == "JPEG2000" and image.mode in ("RGB", "RGBA") and (offset := data.find(b"\xff\x51")) > 0
    ):
        max_value = 2 ** ((data[offset + 40] & 127) + 1) - 1
    elif file_format == "AVIF" and (offset := data.find(b"av1C")) > 0 and data[offset + 6] & 64:
        max_value = 4095 if data[offset + 6] & 32 else 1023
    if not 255 < max_value <= 65535 or number:
        return None
    values = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if values is None or values.dtype != np.uint16 or values.shape[:2] != (image.height, image.width):
        return None
    values = values if values.ndim == 3 else values[..., None]
    if values.shape[2] >= 3:
        values = values[..., [2, 1, 0, 3][: values.shape[2]]]
    if file_format == "PNG" and data[25] == 4:
        values = values[..., [0, 3]]
    if (
        max_value < 65535
    ):  # scaled to 16 bits, as PNG and TIFF have no depth between; distinct values stay distinct
        values = np.round(np.minimum(values, max_value) * (65535 / max_value)).astype(np.uint16)
    extra = ("alpha",) if values.shape[2] in (2, 4) else ()
    return Pixels(np.ascontiguousarray(values), "rgb" if values.shape[2] >= 3 else "grey", extra)


def _ppm_max_value(data: bytes) -> int:
    """The maximum value in the header of a PPM."""
    words: list[bytes] = []
    for line in data[:1000].split(b"\n"):
        words += line.partition(b"#")[0].split()
        if len(words) >= 4:
            break
    return int(words[3]) if len(words) >= 4 and words[3].isdigit() else 255


def _transpose(values: np.ndarray, transpose: Transpose | None) -> np.ndarray:
    return values if transpose is None else np.ascontiguousarray(ARRAY_TRANSPOSES[transpose](values))


def list_frames(data: bytes) -> tuple[list[int], str]:
    """Frame numbers, from 0, and the word for a frame in this format. PhotoError if it is not an image."""
    if tiff.is_tiff(data):
        return tiff.list_pages(data), "page"
    with open_image(data) as image:
        return list(
            range(getattr(image, "n_frames", 1))
        ), "photograph" if image.format in SINGLE_PHOTO_FORMATS else "frame"


def _select_frame(name: str, numbers: list[int], word: str, frame: int | None) -> int:
    """The number, from 0, of frame `frame`. ValueError if there is none, or if None is ambiguous."""
    if frame is None:
        if len(numbers) > 1 and word != "photograph":
            raise ValueError(
                f"{name} has {len(numbers)} {word}s: choose one with --frame N, 1 to {len(numbers)}; "
                "only that one is written"
            )
        return numbers[0]
    if not 1 <= frame <= len(numbers):
        count = f"{len(numbers)} {word}s" if len(numbers) > 1 else f"one {word}"
        raise ValueError(f"--frame {frame}: {name} has {count}, and the first is 1")
    return numbers[frame - 1]


def read_matching_frame(path: Path, role: str, photo: PhotoFile, frame: int | None) -> bytes:
    """The bytes of a mask or drawing; if it has as many frames as the photograph, only frame `frame`.

    ValueError in one line if the file is missing or the frame is ambiguous.
    """
    data = read_file(path, role)
    try:
        numbers, word = list_frames(data)
    except PhotoError:
        return data  # the decoder reports what is wrong
    if len(numbers) == 1 or word == "photograph":
        return data
    if frame is None or len(numbers) != photo.frame_count:
        raise ValueError(
            f"the {role} {path} has {len(numbers)} {word}s, the photograph {photo.frame_count}: "
            f"save the matching one as a separate file"
        )
    file = io.BytesIO()
    try:
        with open_image(data) as image:
            image.seek(numbers[frame - 1])
            image.save(file, "PNG" if image.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16") else "TIFF")
    except PhotoError as error:
        raise ValueError(f"the {role} {path} cannot be read: {error}") from None
    return file.getvalue()


def read_file(path: Path, role: str) -> bytes:
    """The file's bytes; ValueError in one line if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"the {role} {path} cannot be read: {error.strerror or error}") from None
