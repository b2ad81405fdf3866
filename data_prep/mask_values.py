"""Decides which of a mask image's values is the hole: of two values the one that is not black; white, if the values
cluster near black and white; or the one colour near which all values lie that are not black."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import cv2
import numpy as np
from PIL import Image

from data_prep.images import PhotoError, has_alpha

NEAR_LEVELS = 64  # distance from black or white, of 255 levels, that noise and anti-aliasing reach
MAX_BLACK_LEVEL = 16  # a colour no brighter than this is black if another has NEAR_LEVELS or more
MAX_BETWEEN_FRACTION = 0.25  # of pixels between black and white: with more, the image is not a mask
MAX_CLASSES = 8  # distinct values: up to this many, each may be a class
# a third value is present if this fraction of the pixels between black and white is within the half width, in levels
PEAK_HALF_WIDTH, PEAK_FRACTION = 8, 0.6
# values that an error lists, and distinct values above which it only gives their number
MAX_LISTED_VALUES, MAX_NAMED_VALUES = 6, 32
_SQUARE_3X3 = np.ones((3, 3), np.uint8)


class AmbiguousMask(PhotoError):
    """The image is readable, but its values do not tell which of them is the hole."""


@dataclass(frozen=True)
class PixelValues:
    """An image's values: `gray` [H,W] as stored, or for a colour image `rgb` uint8 [H,W,3]."""

    gray: np.ndarray | None
    rgb: np.ndarray | None = None
    class_indices: np.ndarray | None = None
    """[H,W], palette indices"""
    transparent: np.ndarray | None = None
    """bool [H,W]; transparent pixels are black in `gray` and `rgb`"""

    @classmethod
    def from_image(cls, image: Image.Image) -> PixelValues:
        """The values of an image of any mode."""
        if image.mode[0] in "IF":
            values = np.asarray(image)
            return cls(np.nan_to_num(values, nan=0.0) if image.mode == "F" else values.astype(np.int64))
        transparent = None
        if has_alpha(image):
            transparent = np.asarray(image.convert("RGBA"))[..., 3] < 128
            transparent = transparent if transparent.any() and not transparent.all() else None
        if image.mode in ("1", "L"):
            gray = np.asarray(image.convert("L"))
            if transparent is not None:
                gray = np.where(transparent, np.uint8(0), gray)
            return cls(gray, transparent=transparent)
        class_indices = None
        if image.mode == "P":
            class_indices = np.asarray(image)
            colors = np.zeros((256, 3), np.uint8)
            stored_colors = np.array(image.getpalette("RGB") or [], np.uint8).reshape(-1, 3)[:256]
            colors[: len(stored_colors)] = stored_colors
            used = np.flatnonzero(np.bincount(class_indices.ravel(), minlength=256))
            if len(np.unique(colors[used], axis=0)) < len(used):  # two classes have the same colour
                return cls(class_indices, class_indices=class_indices)
            rgb = colors[class_indices]
        else:
            rgb = np.asarray((image.convert("RGBA") if has_alpha(image) else image).convert("RGB"))
        if transparent is not None:
            rgb = np.where(transparent[..., None], np.uint8(0), rgb)
        red, green, blue = (rgb[..., channel] for channel in range(3))
        if np.array_equal(red, green) and np.array_equal(green, blue):
            return cls(np.ascontiguousarray(red), None, class_indices, transparent)
        return cls(None, rgb, class_indices, transparent)

    @cached_property
    def codes(self) -> np.ndarray:
        """One number per value [H,W]; for a colour 0xrrggbb."""
        if self.gray is not None:
            return self.gray
        assert self.rgb is not None
        codes = self.rgb[..., 0].astype(np.int32)
        for channel in (1, 2):
            codes <<= 8
            codes |= self.rgb[..., channel]
        return codes

    @cached_property
    def levels(self) -> np.ndarray:
        """`gray` scaled to uint8. Modes do not tell the depth: the full scale is taken as 1 (floats), 255 or 65535,
        the smallest that is not below the maximum."""
        assert self.gray is not None
        if self.gray.dtype == np.uint8:
            return self.gray
        full_scale = 1 if self.gray.dtype.kind == "f" and self.gray.max() <= 1 else 255
        factor = 255 / full_scale if self.gray.max() <= full_scale else 255 / 65535
        return np.clip(self.gray * factor + 0.5, 0, 255).astype(np.uint8)

    def describe(self) -> str:
        """The most frequent values and the percentage of the image that each covers, most frequent first."""
        codes = self.codes if self.class_indices is None else self.class_indices
        values, counts = np.unique(codes, return_counts=True)
        if len(values) > MAX_NAMED_VALUES:
            if self.gray is None:
                return f"{len(values)} colours"
            return f"{len(values)} values from {values[0]:g} to {values[-1]:g}"
        order = np.argsort(-counts, kind="stable")[:MAX_LISTED_VALUES]
        listed = [
            f"{self._format_value(values[i])} ({_format_percent(counts[i] / codes.size)})" for i in order
        ]
        more = f" and {len(values) - MAX_LISTED_VALUES} more" if len(values) > MAX_LISTED_VALUES else ""
        return f"the value{'s' if len(values) > 1 else ''} {', '.join(listed)}{more}"

    def _format_value(self, code: Any) -> str:
        if self.class_indices is not None and self.rgb is not None:
            color = self.rgb.reshape(-1, 3)[int(np.argmax(self.class_indices == code))]
            return f"{code} = #{bytes(color.tolist()).hex()}"
        return f"{code:.10g}" if self.rgb is None else f"#{int(code):06x}"


def _format_percent(fraction: float) -> str:
    return "under 0.1 %" if fraction < 0.001 else f"{100 * fraction:.3g} %"


def mask_from_two_values(pixels: PixelValues) -> np.ndarray | None:
    """The mask of an image with one or two distinct values; None if it has more. Raises AmbiguousMask."""
    codes = pixels.codes
    low, high = codes.min(), codes.max()
    if not ((codes == low) | (codes == high)).all():
        return None
    ranges = [_channel_range(pixels, code) for code in (low, high)]
    if low == high:
        if low == 0:
            return np.zeros(codes.shape, np.uint8)
        if ranges[0][0] >= 255 - NEAR_LEVELS:  # white
            return np.ones(codes.shape, np.uint8)
        raise AmbiguousMask(f"it has {pixels.describe()} alone: neither black nor white")
    for white, (darkest_of_white, _), (_, brightest_of_black) in (
        (high, ranges[1], ranges[0]),
        (low, ranges[0], ranges[1]),
    ):
        if brightest_of_black <= NEAR_LEVELS and darkest_of_white >= 255 - NEAR_LEVELS:
            return (codes == white).astype(np.uint8)
    black = [
        code for code, (_, brightest) in zip((low, high), ranges) if code == 0 or brightest <= MAX_BLACK_LEVEL
    ]
    max_brightness = max(brightest for _, brightest in ranges)
    if len(black) == 1 and (black[0] == 0 or max_brightness >= NEAR_LEVELS):
        return (codes != black[0]).astype(np.uint8)
    if low == 0:  # both are dark
        return (codes != low).astype(np.uint8)
    raise AmbiguousMask(
        f"which of its two values is the hole? It has {pixels.describe()}, neither of them black"
    )


def _channel_range(pixels: PixelValues, code: Any) -> tuple[int, int]:
    """The darkest and the brightest channel of a value, in levels of 255."""
    if pixels.gray is not None:
        level = int(pixels.levels[pixels.gray == code][0])
        return level, level
    return min(_split_rgb(code)), max(_split_rgb(code))


def _split_rgb(code: int) -> tuple[int, int, int]:
    return int(code) >> 16, int(code) >> 8 & 255, int(code) & 255


def _few_values(pixels: PixelValues) -> list[int]:
    """The distinct values of an image; [] if there are more than MAX_CLASSES."""
    values = np.unique(pixels.codes)
    return values.tolist() if len(values) <= MAX_CLASSES else []


def has_class_numbers(pixels: PixelValues) -> bool:
    """Whether the values are class numbers: a palette in which two have the same colour, or small numbers with 255 for
    "no class"."""
    if pixels.gray is None:
        return False
    if pixels.gray is pixels.class_indices:
        return True
    present = np.flatnonzero(np.bincount(pixels.levels.ravel(), minlength=256))
    if present[-1] != 255 or len(present) < 3 or present[-2] > NEAR_LEVELS:
        return False
    return any(_has_solid_area(pixels.levels == value) for value in present[1:-1][:MAX_CLASSES])


def is_near_black_and_white(pixels: PixelValues) -> bool:
    """Whether there is white, and all other values but black are noise or anti-aliased borders."""
    if pixels.gray is None:
        return _is_color_near_black_and_white(pixels)
    levels = pixels.levels
    counts = np.bincount(levels.ravel(), minlength=256)
    between = int(counts[NEAR_LEVELS + 1 : 255 - NEAR_LEVELS].sum())
    if not counts[255 - NEAR_LEVELS :].any() or between > MAX_BETWEEN_FRACTION * levels.size:
        return False
    present = np.flatnonzero(counts)
    middle = present[(present > NEAR_LEVELS) & (present < 255 - NEAR_LEVELS)]
    if len(present) <= MAX_CLASSES and any(_has_solid_area(levels == value) for value in middle):
        return False
    if between:
        window_counts = np.convolve(
            counts[NEAR_LEVELS + 1 : 255 - NEAR_LEVELS], np.ones(2 * PEAK_HALF_WIDTH + 1, int), "same"
        )
        peak = NEAR_LEVELS + 1 + int(window_counts.argmax())
        near_peak = np.abs(levels.astype(np.int16) - peak) <= PEAK_HALF_WIDTH
        if window_counts.max() > PEAK_FRACTION * between and _has_solid_area(near_peak):
            return False  # a third value: a trimap
    return True


def _is_color_near_black_and_white(pixels: PixelValues) -> bool:
    assert pixels.rgb is not None
    channels = [pixels.rgb[..., channel] for channel in range(3)]
    brightest, darkest = (op.reduce(channels) for op in (np.maximum, np.minimum))
    white = darkest >= 255 - NEAR_LEVELS
    if not white.any() or np.mean(white | (brightest <= NEAR_LEVELS)) < 1 - MAX_BETWEEN_FRACTION:
        return False
    return not _has_solid_area(brightest - darkest > NEAR_LEVELS) and not any(
        _has_solid_area(pixels.codes == code)
        for code in _few_values(pixels)
        if np.ptp(_split_rgb(code)) > MAX_BLACK_LEVEL // 2
    )


def mask_from_one_color(pixels: PixelValues) -> np.ndarray | None:
    """The mask of an image of black and one colour with noise or anti-aliased borders, thresholded midway; None if the
    image has other colours."""
    if pixels.gray is None:
        assert pixels.rgb is not None
        stored, scale = pixels.rgb, 1.0
    else:
        if pixels.gray.dtype.kind != "f" and pixels.gray.max() < NEAR_LEVELS:  # class numbers
            return None
        stored, scale = pixels.gray[..., None], 255 / max(1e-9, float(pixels.gray.max()))
    if sum(_has_solid_area(pixels.codes == code) for code in _few_values(pixels)) > 2:  # classes
        return None
    color = _dominant_color(stored, scale)
    if color is None:
        return None
    hole, outliers, middle = (np.zeros(stored.shape[:2], np.uint8) for _ in range(3))
    for rows in _row_chunks(stored):
        values = np.clip(stored[rows].astype(np.float32) * scale, 0, 255)
        along = values @ color / float(color @ color)  # 0 at black, 1 at the colour
        distance = np.linalg.norm(values - along[..., None] * color, axis=2) / np.linalg.norm(color)
        hole[rows] = along >= 0.5
        outliers[rows] = (distance > 0.4) | (along > 1.4)
        middle[rows] = np.abs(along - 0.5) < 0.2
    middle &= 1 - outliers
    if outliers.mean() > 0.02 or middle.mean() > MAX_BETWEEN_FRACTION or _has_solid_area(outliers):
        return None
    return None if _has_solid_area(cv2.erode(middle, _SQUARE_3X3, borderValue=0)) else hole


def _dominant_color(stored: np.ndarray, scale: float) -> np.ndarray | None:
    """float32 [C], in levels of 255: the most frequent colour of the values that are not dark; None if all are dark."""
    counts, sums = np.zeros(4096), np.zeros((stored.shape[2], 4096))
    for rows in _row_chunks(stored):
        values = np.clip(stored[rows].astype(np.float32) * scale, 0, 255).reshape(-1, stored.shape[2])
        values = values[values.max(1) >= NEAR_LEVELS // 2]
        bins = (values.astype(np.int32) >> 4) @ np.array([256, 16, 1][-stored.shape[2] :])
        counts += np.bincount(bins, minlength=4096)
        for channel, column in enumerate(values.T):
            sums[channel] += np.bincount(bins, column, 4096)
    best = int(counts.argmax())
    return (sums[:, best] / counts[best]).astype(np.float32) if counts[best] else None


def _row_chunks(stored: np.ndarray) -> Iterator[slice]:
    """Slices of rows with about a million pixels each, to bound the memory."""
    height = max(1, 1_000_000 // max(1, stored.shape[1]))
    return (slice(top, top + height) for top in range(0, len(stored), height))


def _has_solid_area(marked: np.ndarray) -> bool:
    """Whether marked pixels fill a 3 x 3 square. Those of an anti-aliased border do not."""
    return bool(cv2.erode(marked.astype(np.uint8), _SQUARE_3X3, borderValue=0).any())
