"""Decodes photographs of any format to upright RGB, or raises PhotoError with a one-line reason."""

from __future__ import annotations

import functools
import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 1 << 27  # 134 megapixels: above every camera, below what fills a worker's memory
MIN_SIDE = 8  # pixels
EXIF_ORIENTATION = 0x0112  # the tag's number
# not EPS: it runs a program
_PIL_FORMATS = [
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
]
# `max_pixels` is checked here, before anything is decoded
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class PhotoError(ValueError):
    """Why these bytes are not a usable photograph."""


def decode_photo(data: bytes, max_pixels: int = MAX_PIXELS, short_side: int | None = None) -> np.ndarray:
    """Decodes a photograph to uint8 RGB [H,W,3]: upright, transparency on white, 16 bits scaled to 8.

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
    """`convert` applied to the upright image. Raises PhotoError for anything wrong with the bytes."""
    with open_image(data, min_side, max_pixels) as photo:
        width, height = photo.size
        if short_side:
            scale = 2 * short_side / min(width, height)
            photo.draft(None, (int(width * scale) + 1, int(height * scale) + 1))
        pixels = _decode_jpeg_opencv(data, photo, width) if convert is to_rgb else None
        if pixels is None:
            ImageOps.exif_transpose(photo, in_place=True)
            pixels = convert(photo)
    return pixels


@contextmanager
def open_image(data: bytes, min_side: int = 1, max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """The image with its header read and its size in pixels checked.

    Raises PhotoError for anything wrong with the bytes, also when they are decoded inside the `with` block.
    """
    if not data:
        raise PhotoError("empty file (0 bytes)")
    try:
        with Image.open(io.BytesIO(data), formats=_available_formats()) as photo:
            check_size(*photo.size, min_side, max_pixels)
            yield photo
    except PhotoError:
        raise
    except UnidentifiedImageError:
        raise PhotoError("not an image in a known format") from None
    except Image.DecompressionBombError:
        raise PhotoError("gigantic: more pixels than can be decoded safely") from None
    except MemoryError:
        raise PhotoError("gigantic: no memory to decode it") from None
    except Exception as error:  # decoders raise nearly anything on damaged files
        first_line = (str(error).splitlines() or [""])[0]
        raise PhotoError(f"damaged or truncated: {first_line or type(error).__name__}") from error


def check_size(width: int, height: int, min_side: int = 1, max_pixels: int = MAX_PIXELS) -> None:
    """Raises PhotoError for an image that is too large or too small."""
    if width * height > max_pixels:
        raise PhotoError(f"gigantic: {width} x {height} is more than {max_pixels} pixels (data.max_pixels)")
    if min(width, height) < min_side:
        raise PhotoError(f"too small: {width} x {height}; both sides need at least {min_side} pixels")


_OPENCV_REDUCED_FLAGS = {  # by scale denominator
    1: 0,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}


def _decode_jpeg_opencv(data: bytes, photo: Image.Image, width: int) -> np.ndarray | None:
    """The pixels that Pillow would decode, by OpenCV, which takes a quarter less time: uint8 [H,W,3] at the size that
    `photo` was drafted to.

    None for everything but upright RGB or grey JPEGs, and for truncated ones (OpenCV would pad them silently).
    """
    if photo.format != "JPEG" or photo.mode not in ("RGB", "L"):
        return None
    reduced_flag = _OPENCV_REDUCED_FLAGS.get(round(width / photo.width))
    if reduced_flag is None or photo.getexif().get(EXIF_ORIENTATION, 1) != 1:
        return None
    if data.rfind(b"\xff\xd9") < _jpeg_scan_offset(data):  # no end marker: truncated
        return None
    flags = (reduced_flag or cv2.IMREAD_COLOR_RGB) | cv2.IMREAD_IGNORE_ORIENTATION
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    if pixels is None or pixels.shape != (photo.height, photo.width, 3):
        return None
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB, dst=pixels) if reduced_flag else pixels


def _jpeg_scan_offset(data: bytes) -> int:
    """Offset of a JPEG's own scan. The segments before it may hold a thumbnail, which has an end marker too."""
    offset = 2
    while data[offset : offset + 1] == b"\xff" and data[offset + 1] != 0xDA:
        offset += 2 + int.from_bytes(data[offset + 2 : offset + 4], "big")
    return offset


def image_suffix(data: bytes) -> str:
    """The usual file suffix of an image's format, such as jpg. Raises PhotoError for unknown formats."""
    try:
        with Image.open(io.BytesIO(data), formats=_available_formats()) as photo:
            name = str(photo.format).lower()
    except Exception as error:
        raise PhotoError("not an image in a known format") from error
    return {"jpeg": "jpg", "mpo": "jpg", "tiff": "tif", "jpeg2000": "jp2"}.get(name, name)


@functools.cache
def _available_formats() -> list[str]:
    Image.init()
    return [name for name in _PIL_FORMATS if name in Image.OPEN]


def has_alpha(photo: Image.Image) -> bool:
    return photo.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in photo.info


def to_rgb(photo: Image.Image) -> np.ndarray:
    """Converts an image of any mode to uint8 RGB [H,W,3]."""
    if photo.mode[0] in "IF":
        gray = np.asarray(photo, np.float64)
        ranges = (1, 255, 65535) if photo.mode == "F" else (255, 65535) if photo.mode == "I" else (65535,)
        # the mode does not give the bit depth
        white = next((limit for limit in ranges if gray.max() <= limit), 65535)
        return np.repeat(np.clip(gray * (255 / white) + 0.5, 0, 255).astype(np.uint8)[..., None], 3, axis=2)
    if has_alpha(photo):
        photo = photo.convert("RGBA")
        photo = Image.alpha_composite(Image.new("RGBA", photo.size, "white"), photo)
    return np.asarray(photo if photo.mode == "RGB" else photo.convert("RGB"))
