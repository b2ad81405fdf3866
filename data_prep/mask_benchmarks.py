"""The masks of the benchmarks of later papers: LaMa's thin, medium and thick ones, MAT's small and large ones.

Each function returns uint8 [H,W], 1 = hole, for a size and a random generator. Both papers publish one configuration
for images of 256 pixels and one for 512. `resolution` names it: 256, 512, or 0 for that of the image (512 from 512
pixels on, else 256). Lengths are scaled by min(H, W) / resolution. LaMa = Suvorov et al., WACV 2022; MAT = Li et al.,
CVPR 2022. docs/papers.md, 9 has the numbers and where they come from.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_prep.mask_strokes import irregular_strokes, zigzag_strokes

RESOLUTIONS = (256, 512)
MAX_TRIES = 1000  # masks drawn until one has an allowed area


@dataclass(frozen=True)
class _LamaConfig:
    """A configuration of LaMa's mask generator; lengths in pixels of its resolution."""

    strokes: tuple[int, int]
    stroke_width: int
    stroke_length: int
    boxes: tuple[int, int] = (0, 0)
    box_sides: tuple[int, int] = (0, 0)
    box_margin: int = 0
    box_weight: float = 0.0
    """Of boxes, relative to strokes with weight 1: a mask has either."""


_LAMA = {
    ("thin", 256): _LamaConfig((4, 50), 10, 40),
    ("thin", 512): _LamaConfig((4, 70), 20, 100),
    ("medium", 256): _LamaConfig((4, 5), 50, 100, (1, 5), (10, 50), 0, 0.3),
    ("medium", 512): _LamaConfig((4, 10), 100, 200, (1, 5), (30, 150), 0, 0.3),
    ("thick", 256): _LamaConfig((1, 5), 100, 200, (1, 3), (30, 150), 10, 0.3),
    ("thick", 512): _LamaConfig((1, 5), 250, 450, (1, 4), (30, 300), 10, 0.3),
}
_MAT = {  # numbers below which there are: rectangles up to half the side, rectangles up to the side, strokes
    ("large", 256): (4, 2, 8),
    ("large", 512): (5, 3, 9),
    ("small", 256): (2, 2, 3),
    ("small", 512): (3, 2, 4),
}
_MAT_VERTICES, _MAT_WIDTHS = (4, 17), (12, 47)


def lama_thin(
    height: int, width: int, rng: np.random.Generator, max_area: float = 0.5, resolution: int = 0
) -> np.ndarray:
    """LaMa: many narrow lines; of masks with more than `max_area` hole another is drawn."""
    return _lama("thin", height, width, rng, max_area, resolution)


def lama_medium(
    height: int, width: int, rng: np.random.Generator, max_area: float = 0.5, resolution: int = 0
) -> np.ndarray:
    """LaMa: lines or, in 3 of 13 masks, rectangles; of masks with more than `max_area` hole another is drawn."""
    return _lama("medium", height, width, rng, max_area, resolution)


def lama_thick(
    height: int, width: int, rng: np.random.Generator, max_area: float = 0.5, resolution: int = 0
) -> np.ndarray:
    """LaMa: broad lines or, in 3 of 13 masks, large rectangles; of masks with more than `max_area` hole another is drawn."""
    return _lama("thick", height, width, rng, max_area, resolution)


def mat_small(
    height: int,
    width: int,
    rng: np.random.Generator,
    min_area: float = 0.0,
    max_area: float = 1.0,
    resolution: int = 0,
) -> np.ndarray:
    """MAT: few rectangles and zigzag lines, with more than `min_area` and less than `max_area` hole."""
    return _mat("small", height, width, rng, min_area, max_area, resolution)


def mat_large(
    height: int,
    width: int,
    rng: np.random.Generator,
    min_area: float = 0.0,
    max_area: float = 1.0,
    resolution: int = 0,
) -> np.ndarray:
    """MAT: more rectangles and zigzag lines, with more than `min_area` and less than `max_area` hole."""
    return _mat("large", height, width, rng, min_area, max_area, resolution)


def _lama(
    name: str, height: int, width: int, rng: np.random.Generator, max_area: float, resolution: int
) -> np.ndarray:
    if not 0 < max_area <= 1:
        raise ValueError(f"mask option max_area {max_area}: above 0, at most 1")
    resolution = _resolve(resolution, height, width)
    config, scale = _LAMA[name, resolution], min(height, width) / resolution
    for _ in range(MAX_TRIES):
        if rng.random() * (1 + config.box_weight) < 1:
            # one more than the configuration's maximum, which the released code adds to an inclusive bound
            count = int(rng.integers(config.strokes[0], config.strokes[1] + 2))
            mask = irregular_strokes(
                height, width, rng, count, config.stroke_width, config.stroke_length, scale
            )
        else:
            mask = _lama_boxes(height, width, rng, config, scale)
        if mask.mean() <= max_area and not mask.all():
            return mask
    raise ValueError(f"mask option max_area {max_area}: none of {MAX_TRIES} masks has so little hole")


def _lama_boxes(
    height: int, width: int, rng: np.random.Generator, config: _LamaConfig, scale: float
) -> np.ndarray:
    mask = np.zeros((height, width), np.uint8)
    margin = int(config.box_margin * scale)
    low = max(1, round(config.box_sides[0] * scale))
    high = max(low, min(round(config.box_sides[1] * scale), min(height, width) - 2 * margin - 1))
    for _ in range(rng.integers(config.boxes[0], config.boxes[1] + 1)):
        box_height, box_width = rng.integers(low, high + 1, 2)
        top = rng.integers(margin, height - margin - box_height + 1)
        left = rng.integers(margin, width - margin - box_width + 1)
        mask[top : top + box_height, left : left + box_width] = 1
    return mask


def _mat(
    name: str,
    height: int,
    width: int,
    rng: np.random.Generator,
    min_area: float,
    max_area: float,
    resolution: int,
) -> np.ndarray:
    if not 0 <= min_area < max_area <= 1:
        raise ValueError(
            f"mask options min_area {min_area}, max_area {max_area}: 0 <= min_area < max_area <= 1"
        )
    resolution = _resolve(resolution, height, width)
    few, large, strokes = _MAT[name, resolution]
    scale = min(height, width) / resolution
    for _ in range(MAX_TRIES):
        mask = np.zeros((height, width), np.uint8)
        for below, part in ((few, 2), (large, 1)):
            for _ in range(rng.integers(below)):
                _fill_rectangle(mask, rng, part)
        lines = zigzag_strokes(
            height, width, rng, int(rng.integers(strokes)), _MAT_VERTICES, _MAT_WIDTHS, scale
        )
        for axis in (0, 1):  # the lines run to the right: mirroring makes both directions equally frequent
            lines = np.flip(lines, axis) if rng.random() > 0.5 else lines
        mask |= lines
        if min_area < mask.mean() < max_area:
            return mask
    raise ValueError(
        f"mask options min_area {min_area}, max_area {max_area}: none of {MAX_TRIES} masks has such an area"
    )


def _fill_rectangle(mask: np.ndarray, rng: np.random.Generator, part: int) -> None:
    """Fill a rectangle with sides below 1 / `part` of the image's; up to half of it lies outside the image."""
    height, width = mask.shape
    box_height, box_width = int(rng.integers(height // part)), int(rng.integers(width // part))
    top = int(rng.integers(-(box_height // 2), height - box_height + box_height // 2))
    left = int(rng.integers(-(box_width // 2), width - box_width + box_width // 2))
    mask[max(top, 0) : top + box_height, max(left, 0) : left + box_width] = 1


def _resolve(resolution: int, height: int, width: int) -> int:
    if resolution not in (0, *RESOLUTIONS):
        raise ValueError(f"mask option resolution {resolution}: 256, 512, or 0 for that of the image's size")
    return resolution or (512 if min(height, width) >= 512 else 256)
