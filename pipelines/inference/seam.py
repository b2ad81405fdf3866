"""Measures whether the border of a filled hole shows as a step in colour.

The step is the difference between the mean colours on both sides of the border, in windows of 5 x 5 pixels along it. A
photograph has such differences everywhere. So it is compared with the same measure along the border moved outwards, over
known pixels, and inwards, over filled ones. Medians along the border leave out the places where an edge of the
photograph crosses it.

The limits were chosen on 72 holes (squares, ellipses and strokes) in the bundled photographs. Of the photographs
themselves, as a perfect fill, 1 of 72 is taken for a seam; of fills by Telea, Navier-Stokes and PatchMatch none; of
blended fills 1 of 72 per method. An offset of 12 levels is found in 45 of 72, of 24 levels in 61: the others are in
textures that hide it. Of fills by the demo's models (context_encoder, edge_connect) 40 of 55 and 64 of 72 show one, with a
median step of 22 and 35 levels; blended, 5 and 10 do.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

RADIUS = 2  # pixels; windows have 2 * RADIUS + 1
MOVE = 2 * RADIUS + 1  # pixels by which the border is moved: no window has pixels of both sides of it
MIN_STEP = 6.0  # levels of 255 by which the step is larger than around it
MIN_RATIO = 2.0  # of the step to that around it
NOISE = 1.5  # levels: the least that is assumed around it
MIN_BORDER = 16  # pixels: the medians of shorter borders are chance
MAX_SIDE = 1024  # pixels; larger holes are measured on every second, third... pixel


@dataclass(frozen=True)
class Seam:
    """Steps in colour in levels of 255."""

    step: float
    """Across the border of the hole."""
    around: float
    """Across the moved border, in the known or in the filled pixels, whichever is larger."""

    @property
    def is_visible(self) -> bool:
        return self.step - self.around >= MIN_STEP and self.step > MIN_RATIO * max(self.around, NOISE)


def measure_seam(image: np.ndarray, filled: np.ndarray, unknown: np.ndarray) -> Seam:
    """The seam of the filled pixels (bool [H,W]) of an image, uint8 RGB [H,W,3]; `unknown` pixels are not read."""
    if not filled.any():
        return Seam(0.0, 0.0)
    rows, columns = (np.flatnonzero(filled.any(axis)) for axis in (1, 0))
    stride = -(-int(max(np.ptp(rows), np.ptp(columns)) + 1) // MAX_SIDE)
    margin = stride * (MOVE + RADIUS + 2)
    box = tuple(
        slice(max(int(line[0]) - margin, 0), int(line[-1]) + margin + 1, stride) for line in (rows, columns)
    )
    image, filled, unknown = image[box], filled[box], unknown[box]
    kernel = np.ones((2 * MOVE + 1, 2 * MOVE + 1), np.uint8)
    outside = cv2.dilate(filled.astype(np.uint8), kernel) > 0
    inside = cv2.erode(filled.astype(np.uint8), kernel) > 0
    known = ~unknown
    return Seam(
        _median_step(image, filled, known),
        max(_median_step(image, outside, known & ~filled), _median_step(image, inside, filled)),
    )


def _median_step(image: np.ndarray, inner: np.ndarray, readable: np.ndarray) -> float:
    """The median step across the border of `inner`, of the channel with the largest step; 0 if the border is short."""
    inner, outer = inner & readable, ~inner & readable
    border = inner & (cv2.dilate(outer.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0)
    if border.sum() < MIN_BORDER:
        return 0.0
    difference = _window_mean(image, inner) - _window_mean(image, outer)
    return float(np.median(np.abs(difference[border]).max(axis=1)))


def _window_mean(image: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """float32 [H,W,3]: the mean of those `pixels` that are in the window around each position."""
    weight = pixels.astype(np.float32)
    total = _window_sum(image * weight[..., None])
    return np.asarray(total / np.maximum(_window_sum(weight), 1)[..., None])


def _window_sum(values: np.ndarray) -> np.ndarray:
    side = 2 * RADIUS + 1
    return cv2.boxFilter(values, -1, (side, side), normalize=False, borderType=cv2.BORDER_CONSTANT)
