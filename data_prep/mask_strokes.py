"""Strokes that several kinds of masks consist of: DeepFill v2's zigzag lines, also MAT's, and LaMa's irregular lines."""

from __future__ import annotations

import math

import cv2
import numpy as np
from PIL import Image, ImageDraw


def zigzag_strokes(
    height: int,
    width: int,
    rng: np.random.Generator,
    count: int,
    vertices: tuple[int, int],
    stroke_widths: tuple[int, int],
    scale: float,
) -> np.ndarray:
    """uint8 [height,width], 1 on `count` zigzag lines with round joints (DeepFill v2's brush).

    `vertices`, `stroke_widths`: least and greatest; the widths are multiplied by `scale` to give pixels.
    """
    image = Image.new("L", (width, height))
    # Pillow's lines have exactly the given width; OpenCV's are up to two pixels wider, and drawing takes less than half
    # of the time (tests/benchmarks/test_masks.py)
    pen = ImageDraw.Draw(image)
    reach = math.hypot(height, width) / 8
    right, bottom = width - 1, height - 1
    for _ in range(count):
        number = rng.integers(vertices[0], vertices[1] + 1)
        low, high = 2 * math.pi / 5 + np.array([-1, 1]) * rng.uniform(0, 2 * math.pi / 15, 2)
        angles = rng.uniform(low, high, number)
        angles[::2] = 2 * math.pi - angles[::2]
        radii = np.clip(rng.normal(reach, reach // 2, number), 0, 2 * reach)
        thickness = max(1, round(float(rng.integers(stroke_widths[0], stroke_widths[1] + 1)) * scale))
        x, y = rng.integers(0, (width, height)).tolist()
        points = [(x, y)]
        # a loop, because each vertex is clipped to the image; Python's floats are faster here than NumPy's
        for dx, dy in zip((np.cos(angles) * radii).tolist(), (np.sin(angles) * radii).tolist()):
            x, y = min(max(x + dx, 0), right), min(max(y + dy, 0), bottom)
            points.append((int(x), int(y)))
        pen.line(points, 1, thickness)
        radius = (thickness - 1) / 2
        for x, y in points:  # round joints and ends; a disc of one pixel is a point
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), 1) if radius else pen.point(
                (x, y), 1
            )
    return np.array(image)


def irregular_strokes(
    height: int,
    width: int,
    rng: np.random.Generator,
    count: int,
    width_range: int,
    length_range: int,
    scale: float,
) -> np.ndarray:
    """uint8 [height,width], 1 on `count` lines of 1 to 5 segments with round ends (LaMa's irregular masks).

    A segment has length 10 + {0 .. length_range - 1} and width 5 + {0 .. width_range - 1}, both multiplied by `scale`,
    and an angle of 0.01 + {0, 1, 2, 3} radians, negative on every second line beginning with the first. Never empty:
    each line begins inside the image.
    """
    mask = np.zeros((height, width), np.uint8)
    for number in range(count):
        x, y = int(rng.integers(width)), int(rng.integers(height))
        for _ in range(rng.integers(1, 6)):
            angle = 0.01 + float(rng.integers(4))
            angle = -angle if number % 2 == 0 else angle
            length = scale * float(10 + rng.integers(length_range))
            thickness = max(1, round(scale * float(5 + rng.integers(width_range))))
            end_x = min(max(int(x + length * math.sin(angle)), 0), width)
            end_y = min(max(int(y + length * math.cos(angle)), 0), height)
            # OpenCV's lines end in half discs, as those of the released code do
            cv2.line(mask, (x, y), (end_x, end_y), 1, thickness)
            x, y = end_x, end_y
    return mask
