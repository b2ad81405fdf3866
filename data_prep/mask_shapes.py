"""How the papers draw their masks: each function gives uint8 [H,W], 1 = hole, from a size and a generator.

Lengths are the papers' pixels: for images of 256 (the context encoder's kinds `center` and `region`: 128), scaled
by min(H, W). The papers: CE = context encoder 2016, DF1/DF2 = DeepFill 2018/2019, EC = EdgeConnect 2019,
GLCIC 2017.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import cv2
import numpy as np
from PIL import Image, ImageDraw


def center(height: int, width: int, rng: np.random.Generator, overlap: float = 0) -> np.ndarray:
    """CE: the centre square of half the side, less `overlap` pixels (of 128) on each side of it."""
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
    {side - delta..side}, placed anywhere within `margin`.
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
    down, across = rng.integers(0, delta // 2 + 1, 2)
    return _rectangle(height, width, top + down, left + across, side - 2 * down, side - 2 * across)


def block(height: int, width: int, rng: np.random.Generator, count: int = 1) -> np.ndarray:
    """`count` equal rectangles, possibly overlapping, a quarter of the image together at most.

    count 1 (EC): one of half the height and half the width, anywhere: exactly a quarter. More (CE's random block).
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
    """EC: the left or the right half."""
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
    """DF2's free-form brush: 1 to `strokes` zigzag lines with rounded joints; never empty."""
    if not (strokes >= 1 and 1 <= min_vertices <= max_vertices and 1 <= min_width <= max_width):
        raise ValueError(
            "mask options of brush: strokes >= 1, 1 <= min_vertices <= max_vertices, likewise the widths"
        )
    image = Image.new("L", (width, height))
    # Pillow's strokes are as wide as asked; OpenCV's are up to two pixels wider, and what is drawn takes the smaller
    # part of the time (tests/benchmarks/test_masks.py)
    pen = ImageDraw.Draw(image)
    scale = min(height, width) / 256
    reach = math.hypot(height, width) / 8
    right, bottom = width - 1, height - 1
    for _ in range(rng.integers(1, strokes + 1)):
        count = rng.integers(min_vertices, max_vertices + 1)
        low, high = 2 * math.pi / 5 + np.array([-1, 1]) * rng.uniform(0, 2 * math.pi / 15, 2)
        angles = rng.uniform(low, high, count)
        angles[::2] = 2 * math.pi - angles[::2]
        radii = np.clip(rng.normal(reach, reach // 2, count), 0, 2 * reach)
        thickness = max(1, round(float(rng.integers(min_width, max_width + 1)) * scale))
        x, y = rng.integers(0, (width, height)).tolist()
        points = [(x, y)]
        # one vertex after the other, as each is clipped: on single numbers, Python's own are faster than NumPy's
        for across, down in zip((np.cos(angles) * radii).tolist(), (np.sin(angles) * radii).tolist()):
            x, y = min(max(x + across, 0), right), min(max(y + down, 0), bottom)
            points.append((int(x), int(y)))
        pen.line(points, 1, thickness)
        radius = (thickness - 1) / 2
        for x, y in points:  # round joints and ends; a disc of one pixel is a point
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), 1) if radius else pen.point(
                (x, y), 1
            )
    return np.array(image)


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
    """DF2: the union of DF1's box and a brush."""
    rectangle = box(height, width, rng, side, delta, margin)
    return rectangle | brush(height, width, rng, strokes, min_vertices, max_vertices, min_width, max_width)


def region(
    height: int, width: int, rng: np.random.Generator, least: float = 0.2, most: float = 0.3
) -> np.ndarray:
    """CE: a window of one large random pattern of which more than `least` and less than `most` is hole."""
    if not 0 <= least < most <= 1:
        raise ValueError(f"mask options least {least}, most {most}: 0 <= least < most <= 1")
    corners = _region_corners(height, width, least, most)
    top, left = corners[rng.integers(len(corners))]
    return _region_pattern(min(height, width))[top : top + height, left : left + width].copy()


_NOISE = 600  # CE enlarges 600 x 600 random numbers to 10,000 x 10,000 for images of 128 pixels ...
_GRAIN = 10_000 / _NOISE / 128  # ... so one number covers this share of the image's side
_PATTERN = 10_000  # pixels a side at most: larger images see a part of the noise, equally fine
_STRIDE = 8  # pixels between the windows that can be drawn


@functools.lru_cache(maxsize=2)
def _region_pattern(side: int) -> np.ndarray:
    """The pattern for images of `side` pixels, made once a process: uint8, 1 where the enlarged noise is below 1/4."""
    grain = _GRAIN * side
    cells = min(_NOISE, int(_PATTERN / grain))
    total = int(cells * grain)
    noise = np.random.default_rng(2016).random((_NOISE, _NOISE), np.float32)[:cells, :cells]
    pattern = np.empty((total, total), np.uint8)
    tall = cv2.resize(
        noise, (cells, total), interpolation=cv2.INTER_CUBIC
    )  # bicubic is separable: rows first,
    for start in range(0, total, 512):  # then columns, in strips: never the whole in floats
        strip = tall[start : start + 512]
        pattern[start : start + 512] = (
            cv2.resize(strip, (total, len(strip)), interpolation=cv2.INTER_CUBIC) < 0.25
        )
    pattern.setflags(write=False)
    return pattern


@functools.lru_cache(maxsize=8)
def _region_corners(height: int, width: int, least: float, most: float) -> np.ndarray:
    """int32 [n,2]: the (top, left) of every usable window, on a grid of _STRIDE pixels.

    A summed-area table, of which only the rows in use are kept: whole, it would take 400 MB. The sums over a window's
    rows are moved down the pattern, and an area is the difference of two of their running sums.
    """
    pattern = _region_pattern(min(height, width))
    total = len(pattern)
    columns = pattern[:height].sum(0, dtype=np.int32)
    corners = []
    lefts = np.arange(0, total - width + 1, _STRIDE)
    for top in range(0, total - height + 1, _STRIDE):
        if top:
            columns += pattern[top + height - _STRIDE : top + height].sum(0, dtype=np.int32)
            columns -= pattern[top - _STRIDE : top].sum(0, dtype=np.int32)
        running = np.concatenate([[0], np.cumsum(columns)])
        areas = (running[lefts + width] - running[lefts]) / (height * width)
        usable = lefts[(areas > least) & (areas < most)]
        corners.append(np.stack([np.full_like(usable, top), usable], 1).astype(np.int32))
    found = np.concatenate(corners)
    if not len(found):
        raise ValueError(
            f"mask options least {least}, most {most}: no window of {height} x {width} has such an area"
        )
    return found


SHAPES: dict[str, Callable[..., np.ndarray]] = {
    "center": center,
    "box": box,
    "block": block,
    "region": region,
    "brush": brush,
    "box_and_brush": box_and_brush,
    "half": half,
}
