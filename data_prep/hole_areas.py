"""Bands of hole area, by which scores are reported."""

from __future__ import annotations

import numpy as np

HOLE_AREA_BANDS = ("0-10", "10-20", "20-30", "30-40", "40-50", "50-60", "60-100")  # per cent of the image


def hole_area_band(mask: np.ndarray) -> str:
    """The hole-area band of a mask [H,W] (1 = hole) in per cent, open below and closed above: (lo, hi].

    Computed in integers, so that a hole of exactly a fifth is in "10-20" (partial convolution, section 4.1's bins).
    """
    hole_pixels = int(np.count_nonzero(mask))
    tenth = -(-10 * hole_pixels // mask.size)  # ceil(10 * area)
    return HOLE_AREA_BANDS[min(max(tenth - 1, 0), len(HOLE_AREA_BANDS) - 1)]
