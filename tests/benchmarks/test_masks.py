"""Milliseconds per mask of every kind at 256 pixels on one core; the brush against DeepFill v2's released code, the random
region against rejection sampling of windows. `make bench` prints the table."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import cv2
import numpy as np
import pytest
from PIL import Image, ImageDraw

from data_prep.mask_shapes import _region_pattern
from data_prep.masks import MASK_KINDS, make_mask

SIDE, COUNT = 256, 300
MakeMask = Callable[[np.random.Generator], np.ndarray]


def milliseconds(make: MakeMask, repeats: int = 5) -> float:
    """Per mask, in the best of several rounds over the same seeds. Thread time, so that other load does not count."""
    seconds = []
    for _ in range(repeats):
        rngs = [np.random.default_rng(seed) for seed in range(COUNT)]
        start = time.thread_time()
        for rng in rngs:
            make(rng)
        seconds.append(time.thread_time() - start)
    return 1e3 * min(seconds) / COUNT


def released_brush(rng: np.random.Generator) -> np.ndarray:
    """docs/papers.md 3.4 as in the released code: one call per random number, a disc at each vertex."""
    mean_radius, mean_angle, jitter = math.sqrt(2 * SIDE * SIDE) / 8, 2 * math.pi / 5, 2 * math.pi / 15
    mask = Image.new("L", (SIDE, SIDE), 0)
    for _ in range(rng.integers(1, 4)):
        count = rng.integers(4, 12)
        low, high = mean_angle - rng.uniform(0, jitter), mean_angle + rng.uniform(0, jitter)
        angles = [
            2 * math.pi - rng.uniform(low, high) if i % 2 == 0 else rng.uniform(low, high)
            for i in range(count)
        ]
        vertices = [(int(rng.integers(0, SIDE)), int(rng.integers(0, SIDE)))]
        for angle in angles:
            radius = np.clip(rng.normal(mean_radius, mean_radius // 2), 0, 2 * mean_radius)
            x = np.clip(vertices[-1][0] + radius * math.cos(angle), 0, SIDE)
            y = np.clip(vertices[-1][1] + radius * math.sin(angle), 0, SIDE)
            vertices.append((int(x), int(y)))
        draw, width = ImageDraw.Draw(mask), int(rng.uniform(12, 40))
        draw.line(vertices, fill=1, width=width)
        for x, y in vertices:
            draw.ellipse((x - width // 2, y - width // 2, x + width // 2, y + width // 2), fill=1)
    return np.asarray(mask, np.float32)


def released_region(rng: np.random.Generator) -> np.ndarray:
    """docs/papers.md 1.3: sample windows of the pattern until one has more than 20 and less than 30 per cent hole."""
    pattern = _region_pattern(SIDE)
    while True:
        top, left = rng.integers(0, len(pattern) - SIDE + 1, 2)
        window = pattern[top : top + SIDE, left : left + SIDE]
        if 0.2 < window.mean() < 0.3:
            return window.copy()


@pytest.mark.benchmark
def test_speed_of_every_kind(capsys: pytest.CaptureFixture[str]) -> None:
    cv2.setNumThreads(1)
    make_mask("region", SIDE, SIDE, np.random.default_rng(0))  # computes the cached pattern
    ours = {
        kind: milliseconds(lambda rng, kind=kind: make_mask(kind, SIDE, SIDE, rng)) for kind in MASK_KINDS
    }
    released = {"brush": milliseconds(released_brush), "region": milliseconds(released_region)}
    rows = [
        f"{kind:<15}{ms:6.3f}"
        + (f"{released[kind]:10.3f}{released[kind] / ms:7.1f}" if kind in released else "")
        for kind, ms in ours.items()
    ]
    with capsys.disabled():
        print(f"\nMasks of {SIDE} px, one thread\nkind              ms  released  ratio", *rows, sep="\n")
    assert released["brush"] / ours["brush"] >= 1.3
    assert released["region"] / ours["region"] >= 2
