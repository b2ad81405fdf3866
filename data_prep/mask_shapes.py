"""The masks of the papers: each function returns uint8 [H,W], 1 = hole, for a size and a random generator.

Lengths are in the papers' pixels: for images of 256 (the context encoder's kinds `center` and `region`: 128), scaled
by min(H, W). The papers: CE = context encoder 2016, DF1/DF2 = DeepFill 2018/2019, EC = EdgeConnect 2019,
GLCIC 2017. Those of LaMa and MAT are in mask_benchmarks.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import cv2
import numpy as np

from data_prep.mask_benchmarks import lama_medium, lama_thick, lama_thin, mat_large, mat_small
from data_prep.mask_strokes import zigzag_strokes


def center(height: int, width: int, rng: np.random.Generator, overlap: float = 0) -> np.ndarray:
    """CE: the centre square of half the side, reduced by `overlap` pixels (of 128) on each of its sides."""
    inset = round(overlap * min(height, width) / 128)
    top, left = height // 4 + inset, width // 4 + inset
    bottom, right = height // 4 + height // 2 - inset, width // 4 + width // 2 - inset
    if bottom <= top or right <= left:
        raise ValueError(f"mask option overlap {overlap}: nothing is left of the centre; below 32")
    return _rectangle(height, width, top, left, bottom - top, right - left)


def box(
    height: int,
    width: int,
    rng: np.random.Generator,
    side: int = 128,
    delta: int = 32,
    margin: int = 0,
    rule: str = "deepfill",
) -> np.ndarray:
    """One rectangle, each side between side - delta and side.

    rule "deepfill" (DF1, DF2): a square of `side`, its corner uniform and at least `margin` from the border, shrunk
    on each axis by U{0..delta/2} from both ends; delta 0 is their test mask. rule "glcic": each side uniform in
    {side - delta..side}, the position uniform, at least `margin` from the border.
    """
    if not (0 <= delta < side and margin >= 0 and side + 2 * margin <= 256):
        raise ValueError(
            "mask options side, delta, margin: 0 <= delta < side <= 256 - 2 margin, in pixels of 256"
        )
    scale = min(height, width) / 256
    side, margin = max(1, round(side * scale)), int(margin * scale)
    delta = min(round(delta * scale), side - 1)
    if rule == "glcic":
        box_height, box_width = rng.integers(side - delta, side + 1, 2)
        top = rng.integers(margin, height - margin - box_height + 1)
        left = rng.integers(margin, width - margin - box_width + 1)
        return _rectangle(height, width, top, left, box_height, box_width)
    if rule != "deepfill":
        raise ValueError(f"mask option rule {rule!r}: deepfill or glcic")
    # the corner's upper bound is exclusive, as in the released code: the last row and column stay known
    top = rng.integers(margin, max(height - margin - side, margin + 1))
    left = rng.integers(margin, max(width - margin - side, margin + 1))
    inset_y, inset_x = rng.integers(0, delta // 2 + 1, 2)
    return _rectangle(height, width, top + inset_y, left + inset_x, side - 2 * inset_y, side - 2 * inset_x)


def block(height: int, width: int, rng: np.random.Generator, count: int = 1) -> np.ndarray:
    """`count` equal rectangles, possibly overlapping, that cover at most a quarter of the image.

    count 1 is EC's: half the height and half the width, anywhere, exactly a quarter. More are CE's random block.
    """
    if count < 1:
        raise ValueError(f"mask option count {count}: 1 or more")
    mask = np.zeros((height, width), np.uint8)
    box_height = max(1, int(height // 2 / math.sqrt(count)))
    box_width = max(1, int(width // 2 / math.sqrt(count)))
    for _ in range(count):
        top, left = rng.integers(0, height - box_height + 1), rng.integers(0, width - box_width + 1)
        mask[top : top + box_height, left : left + box_width] = 1
    return mask


def half(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """EC: the left or the right half, with equal probability."""
    left = 0 if rng.random() < 0.5 else width - width // 2
    return _rectangle(height, width, 0, left, height, width // 2)


def _rectangle(height: int, width: int, top: int, left: int, box_height: int, box_width: int) -> np.ndarray:
    mask = np.zeros((height, width), np.uint8)
    mask[top : top + box_height, left : left + box_width] = 1
    return mask


def brush(
    height: int,
    width: int,
    rng: np.random.Generator,
    strokes: int = 3,
    min_vertices: int = 4,
    max_vertices: int = 11,
    min_width: int = 12,
    max_width: int = 39,
) -> np.ndarray:
    """DF2's free-form brush: 1 to `strokes` zigzag lines with round joints; never empty."""
    if not (strokes >= 1 and 1 <= min_vertices <= max_vertices and 1 <= min_width <= max_width):
        raise ValueError(
            "mask options of brush: strokes >= 1, 1 <= min_vertices <= max_vertices, likewise the widths"
        )
    count = int(rng.integers(1, strokes + 1))
    scale = min(height, width) / 256
    return zigzag_strokes(
        height, width, rng, count, (min_vertices, max_vertices), (min_width, max_width), scale
    )


def box_and_brush(
    height: int,
    width: int,
    rng: np.random.Generator,
    side: int = 128,
    delta: int = 32,
    margin: int = 0,
    strokes: int = 3,
    min_vertices: int = 4,
    max_vertices: int = 11,
    min_width: int = 12,
    max_width: int = 39,
) -> np.ndarray:
    """DF2: the union of DF1's box and DF2's brush."""
    rectangle = box(height, width, rng, side, delta, margin)
    return rectangle | brush(height, width, rng, strokes, min_vertices, max_vertices, min_width, max_width)


def region(
    height: int, width: int, rng: np.random.Generator, min_area: float = 0.2, max_area: float = 0.3
) -> np.ndarray:
    """CE: a window of one large random pattern of which more than `min_area` and less than `max_area` is hole."""
    if not 0 <= min_area < max_area <= 1:
        raise ValueError(
            f"mask options min_area {min_area}, max_area {max_area}: 0 <= min_area < max_area <= 1"
        )
    corners = _region_corners(height, width, min_area, max_area)
    top, left = corners[rng.integers(len(corners))]
    return _region_pattern(min(height, width))[top : top + height, left : left + width].copy()


_NOISE_SIDE = 600  # CE resizes 600 x 600 random numbers to 10,000 x 10,000 for images of 128 pixels,
_NOISE_CELL = 10_000 / _NOISE_SIDE / 128  # so one number covers this fraction of the image's side
_MAX_PATTERN_SIDE = 10_000  # pixels; larger images use only a part of the noise, at the same scale
_WINDOW_STRIDE = 8  # pixels between the windows that can be sampled


@functools.lru_cache(maxsize=2)
def _region_pattern(side: int) -> np.ndarray:
    """The pattern for images of `side` pixels, computed once per process: uint8, 1 where the resized noise is below 1/4."""
    cell_pixels = _NOISE_CELL * side
    cells = min(_NOISE_SIDE, int(_MAX_PATTERN_SIDE / cell_pixels))
    total = int(cells * cell_pixels)
    noise = np.random.default_rng(2016).random((_NOISE_SIDE, _NOISE_SIDE), np.float32)[:cells, :cells]
    pattern = np.empty((total, total), np.uint8)
    # bicubic interpolation is separable: first vertically, then horizontally in strips, to save memory
    tall = cv2.resize(noise, (cells, total), interpolation=cv2.INTER_CUBIC)
    for start in range(0, total, 512):
        strip = tall[start : start + 512]
        pattern[start : start + 512] = (
            cv2.resize(strip, (total, len(strip)), interpolation=cv2.INTER_CUBIC) < 0.25
        )
    pattern.setflags(write=False)
    return pattern


@functools.lru_cache(maxsize=8)
def _region_corners(height: int, width: int, min_area: float, max_area: float) -> np.ndarray:
    """int32 [n,2]: the (top, left) of every window with a suitable area, on a grid of _WINDOW_STRIDE pixels.

    A whole summed-area table would take 400 MB. Instead, the column sums over a window's height are moved down the
    pattern, and an area is the difference of two of their cumulative sums.
    """
    pattern = _region_pattern(min(height, width))
    total = len(pattern)
    column_sums = pattern[:height].sum(0, dtype=np.int32)
    corners = []
    lefts = np.arange(0, total - width + 1, _WINDOW_STRIDE)
    for top in range(0, total - height + 1, _WINDOW_STRIDE):
        if top:
            column_sums += pattern[top + height - _WINDOW_STRIDE : top + height].sum(0, dtype=np.int32)
            column_sums -= pattern[top - _WINDOW_STRIDE : top].sum(0, dtype=np.int32)
        cumulative = np.concatenate([[0], np.cumsum(column_sums)])
        areas = (cumulative[lefts + width] - cumulative[lefts]) / (height * width)
        usable = lefts[(areas > min_area) & (areas < max_area)]
        corners.append(np.stack([np.full_like(usable, top), usable], 1).astype(np.int32))
    all_corners = np.concatenate(corners)
    if not len(all_corners):
        raise ValueError(
            f"mask options min_area {min_area}, max_area {max_area}: no window of {height} x {width} has such an area"
        )
    return all_corners


MASK_GENERATORS: dict[str, Callable[..., np.ndarray]] = {
    "center": center,
    "box": box,
    "block": block,
    "region": region,
    "brush": brush,
    "box_and_brush": box_and_brush,
    "half": half,
    "lama_thin": lama_thin,
    "lama_medium": lama_medium,
    "lama_thick": lama_thick,
    "mat_small": mat_small,
    "mat_large": mat_large,
}
