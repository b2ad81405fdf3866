"""Milliseconds a mask of each kind, and strokes beside Pillow's and NumPy's plain way. `make bench` prints them."""

from __future__ import annotations

import time

import numpy as np
import pytest

from data_prep.masks import MASK_KINDS, make_mask

SIZE, COUNT = 256, 400


@pytest.mark.benchmark
def test_masks(capsys: pytest.CaptureFixture[str]) -> None:
    spent = {}
    for kind in MASK_KINDS:
        make_mask(kind, SIZE, SIZE, np.random.default_rng(0))  # what is made once a process
        best = []
        for seed in range(3):
            rng = np.random.default_rng(seed)
            start = time.perf_counter()
            for _ in range(COUNT):
                make_mask(kind, SIZE, SIZE, rng)
            best.append((time.perf_counter() - start) / COUNT)
        spent[kind] = min(best)

    def by_distance() -> np.ndarray:
        """One stroke as NumPy draws it: every pixel's distance to the line."""
        y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32)
        along = np.clip(((x - 20) * 100 + (y - 30) * 50) / (100**2 + 50**2), 0, 1)
        return np.hypot(x - 20 - 100 * along, y - 30 - 50 * along) < 15

    start = time.perf_counter()
    for _ in range(40):
        for _ in range(15):  # as many strokes as a brush has in the mean
            by_distance()
    plain = (time.perf_counter() - start) / 40
    with capsys.disabled():
        print(f"\nMilliseconds a mask of {SIZE} x {SIZE} pixels")
        print(*(f"{kind:14s} {1e3 * seconds:7.3f}" for kind, seconds in spent.items()), sep="\n")
        print(
            f"a brush by NumPy's distances: {1e3 * plain:.2f} ms, {plain / spent['brush']:.0f} times as long"
        )
    assert plain > 5 * spent["brush"]
