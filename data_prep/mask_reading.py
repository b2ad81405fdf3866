"""Reads a mask image in whatever form a tool wrote it: uint8 [H,W] with 1 = hole, or an error that lists its values.

Values near black and white are thresholded at half, and white is the hole: this covers JPEG noise, anti-aliased
borders, 254 and 1, 16 bits. Of two values, one of them black, the other is the hole: red on black, class numbers 0 and
1. Everything else is ambiguous: the caller says which value is the hole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageColor

from data_prep.images import decode_image, has_alpha, to_rgb
from data_prep.mask_values import (
    MAX_CLASSES,
    NEAR_LEVELS,
    AmbiguousMask,
    PixelValues,
    has_class_numbers,
    is_near_black_and_white,
    mask_from_one_color,
    mask_from_two_values,
)

LOSSY_TOLERANCE = 32  # levels by which a lossy format changes a value
_JPEG = ("JPEG", "MPO")
_LOSSY = (*_JPEG, "WEBP", "AVIF", "JPEG2000")


@dataclass(frozen=True)
class HoleValue:
    """A value that is the hole: grey levels or class numbers `low` to `high`, or a colour."""

    text: str
    low: float = 0
    high: float = 0
    color: tuple[int, int, int] | None = None


def parse_hole_values(value: Any) -> tuple[HoleValue, ...]:
    """The option `hole`: a grey level or class number (2), a range of them ("128-255"), a colour ("#ff0000", "red"), or
    a list of these. Raises ValueError, in one line, for anything else."""
    if isinstance(value, list | tuple):
        if not value:
            raise ValueError("hole: [] is empty: name a value, such as 1 or '#ff0000'")
        return tuple(hole_value for item in value for hole_value in parse_hole_values(item))
    if value is None:
        raise ValueError("hole has no value; a colour is put in quotes: hole: '#ff0000'")
    text = str(value).strip()
    if not isinstance(value, bool):
        if numbers := re.fullmatch(r"(\d+(?:\.\d+)?)(?:-(\d+(?:\.\d+)?))?", text):
            low = float(numbers[1])
            high = float(numbers[2] or low)
            if low <= high:
                return (HoleValue(f"{low:.15g}" if low == high else f"{low:.15g}-{high:.15g}", low, high),)
        for name in (text, f"#{text}"):
            try:
                color = ImageColor.getrgb(name)[:3]
                return (HoleValue(f"#{bytes(color).hex()}", color=color),)
            except ValueError:
                continue
    raise ValueError(
        f"hole: {value!r} is not valid: a grey level or class number such as 2, levels such as 128-255, or a colour "
        "such as '#ff0000'"
    )


def read_mask(
    data: bytes | Path, invert: bool | None = None, dilate: int = 0, hole: Sequence[HoleValue] = ()
) -> np.ndarray:
    """A mask image of any mode as uint8 [H,W], 1 = hole; the hole is grown by `dilate` pixels.

    White is the hole; with `invert`, black. None means False: check with `looks_inverted` and warn. Of two values, one
    of them black, the other is the hole; `hole` lists values that are the hole. In an image with transparency, strokes
    on a transparent background are the hole; of a partly erased photograph, the erased part is.
    Raises PhotoError if it is not a readable image, AmbiguousMask with the values if they do not tell the hole.
    """
    return read_mask_and_matches(data, invert, dilate, hole)[0]


def read_mask_and_matches(
    data: bytes | Path, invert: bool | None = None, dilate: int = 0, hole: Sequence[HoleValue] = ()
) -> tuple[np.ndarray, frozenset[int]]:
    """`read_mask`, and the indices of the values of `hole` that occur in the image."""
    matched: set[int] = set()
    data = _read_bytes(data)

    def convert(image: Image.Image) -> np.ndarray:
        image = _restore_low_bytes(image, data)
        if not hole:
            return image_to_mask(image)
        matches = [_match_value(image, value) for value in hole]
        matched.update(index for index, match in enumerate(matches) if match.any())
        return np.logical_or.reduce(matches).astype(np.uint8)

    mask = decode_image(data, convert)
    if invert:
        mask = 1 - mask
    if dilate > 0:
        squares = np.arange(-dilate, dilate + 1) ** 2
        disc = (squares[:, None] + squares <= dilate**2).astype(np.uint8)
        mask = cv2.dilate(mask, disc)
    return mask, frozenset(matched)


def read_drawing(data: bytes | Path) -> np.ndarray:
    """A drawing in any colour on any background as uint8 [H,W], 1 = light: grey is thresholded at half. Raises
    PhotoError."""

    def convert(image: Image.Image) -> np.ndarray:
        mask = _mask_from_alpha(image, 0) if has_alpha(image) else None
        return threshold_at_half(image) if mask is None else mask

    return decode_image(_read_bytes(data), convert)


def describe_values(data: bytes | Path) -> str:
    """The values of a mask image in words, for messages. Raises PhotoError if it is not a readable image."""
    descriptions: list[str] = []
    data = _read_bytes(data)

    def convert(image: Image.Image) -> np.ndarray:
        descriptions.append(PixelValues.from_image(_restore_low_bytes(image, data)).describe())
        return np.zeros((1, 1), np.uint8)

    decode_image(data, convert)
    return descriptions[0]


def threshold_at_half(image: Image.Image) -> np.ndarray:
    """uint8 [H,W], 1 where an image is light. Some tools write 0 and 1 for black and white."""
    if has_alpha(image) and image.mode[0] not in "IF":
        image = image.convert("RGBA").convert("RGB")
    gray = to_rgb(image)[..., 0] if image.mode[0] in "IF" else np.asarray(image.convert("L"))
    return (gray >= (128 if gray.max() > 1 else 1)).astype(np.uint8)


def _read_bytes(data: bytes | Path) -> bytes:
    return data.read_bytes() if isinstance(data, Path) else data


def _restore_low_bytes(image: Image.Image, data: bytes) -> Image.Image:
    """Pillow drops the low bytes of PNGs with 16 bits per channel. Where all values are below 256, return these."""
    if data[:8] != b"\x89PNG\r\n\x1a\n" or data[24] != 16 or data[25] not in (2, 4, 6):
        return image
    full = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if full is None or full.ndim != 3 or full.shape[1::-1] != image.size or full[..., :3].max() > 255:
        return image
    low = Image.fromarray(np.ascontiguousarray(full[..., 2::-1].astype(np.uint8)))
    if has_alpha(image):
        low.putalpha(image.getchannel("A"))
    return low


def image_to_mask(image: Image.Image) -> np.ndarray:
    """An image as uint8 [H,W], 1 = hole, by the rules of `read_mask`. Raises AmbiguousMask."""
    if has_alpha(image) and (mask := _mask_from_alpha(image)) is not None:
        return mask
    pixels = PixelValues.from_image(image)
    if (mask := mask_from_two_values(pixels)) is not None:
        return mask
    if not has_class_numbers(pixels):
        if is_near_black_and_white(pixels):
            light = threshold_at_half(image)
            return light if pixels.transparent is None else light * ~pixels.transparent
        if (mask := mask_from_one_color(pixels)) is not None:
            return mask
    raise AmbiguousMask(f"which of its values is the hole? It has {pixels.describe()}")


def _mask_from_alpha(image: Image.Image, max_colors: int = MAX_CLASSES) -> np.ndarray | None:
    """The mask given by an image's transparent pixels; None if all are opaque or all transparent, or if the opaque
    pixels decide: they have up to `max_colors` colours, or none of them is light."""
    if image.mode[0] in "IF":
        return None
    rgba = np.asarray(image.convert("RGBA"))
    opaque = rgba[..., 3] >= 128
    if not opaque.any() or opaque.all():
        return None
    gray = rgba[..., :3].mean(2)
    visible = gray[opaque]
    if np.ptp(visible) < NEAR_LEVELS:  # one colour: strokes
        return opaque.astype(np.uint8)
    if np.mean(np.abs(visible - 127.5) < 95) > 0.1:  # many tones: a photograph, or strokes of several colours
        if len(np.unique(rgba[..., :3][opaque], axis=0)) <= max_colors:
            return None
        return (~opaque).astype(np.uint8)
    light = opaque & (gray >= 128)
    return light.astype(np.uint8) if light.any() else None


def _match_value(image: Image.Image, value: HoleValue) -> np.ndarray:
    """bool [H,W]: where an image has this value and is not transparent."""
    pixels = PixelValues.from_image(image)
    only_visible: Callable[[np.ndarray], np.ndarray] = lambda match: match  # noqa: E731
    if has_alpha(image) and image.mode[0] not in "IF":
        opaque = np.asarray(image.convert("RGBA"))[..., 3] >= 128
        if opaque.any():
            only_visible = lambda match: match & opaque  # noqa: E731
    is_lossy = image.format in _JPEG or (value.color and image.format in _LOSSY)
    tolerance = LOSSY_TOLERANCE if is_lossy else 0
    if value.color is not None:
        if pixels.gray is None or image.mode == "P":
            assert pixels.rgb is not None or image.mode == "P"
            rgb = np.asarray(image.convert("RGB")) if pixels.rgb is None else pixels.rgb
            return only_visible((np.abs(rgb.astype(np.int16) - value.color) <= tolerance).all(2))
        levels = pixels.levels.astype(np.int16)
        matches = [np.abs(levels - channel) <= tolerance for channel in value.color]
        return only_visible(np.logical_and.reduce(matches))
    if image.mode == "1" and value.low == value.high == 1:
        return only_visible(pixels.codes > 0)
    if pixels.class_indices is not None:
        return only_visible((pixels.class_indices >= value.low) & (pixels.class_indices <= value.high))
    if pixels.gray is not None:
        return only_visible((pixels.gray >= value.low - tolerance) & (pixels.gray <= value.high + tolerance))
    assert pixels.rgb is not None
    darkest, brightest = pixels.rgb.min(2), pixels.rgb.max(2)
    return only_visible(
        (darkest >= value.low - tolerance)
        & (brightest <= value.high + tolerance)
        & (brightest - darkest <= tolerance)
    )
