"""Where a large photograph is filled: a window around each hole, shown to the model no larger than it can bear."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

NEAR = 8  # holes closer than twice this, in pixels, are one hole
STEP = 32  # windows are rounded up to this many pixels: every new size costs a model memory for good


@dataclass(frozen=True)
class Window:
    """A part of a photograph, in pixels, and the size at which the model sees it."""

    top: int
    left: int
    height: int
    width: int
    seen: tuple[int, int]
    """Height and width after resizing; (height, width) when it is seen as it is."""
    group: int
    """Which holes are filled from here (others in it are filled from windows of their own)."""

    @property
    def place(self) -> tuple[slice, slice]:
        return slice(self.top, self.top + self.height), slice(self.left, self.left + self.width)

    @property
    def resized(self) -> bool:
        return self.seen != (self.height, self.width)


class Plan:
    """Windows that together cover every hole of a mask bool [H,W].

    A window is a square twice as long as its hole's box (rounded up), at least `size`, inside the photograph. Windows
    that overlap become one, unless that one would be longer than `max_side`: then each is seen in its own resolution,
    one after the other. A window longer than `max_side` is seen smaller; but a long thin hole, a scratch, is cut.
    """

    def __init__(self, hole: np.ndarray, size: int, max_side: int) -> None:
        self._shape, self._size, self._max = hole.shape[:2], size, max_side
        self._labels, boxes = _components(hole)
        boxes = np.concatenate([boxes, *self._cut(hole, boxes)])
        members = [[label] for label in range(1, len(boxes) + 1)]
        there = boxes[:, 2] > 0  # what was cut leaves no pixel
        boxes, members = boxes[there], [label for label, kept in zip(members, there) if kept]
        self._group_of = np.zeros(len(there) + 1, np.int64)
        merged = -1
        while merged != len(boxes):
            merged = len(boxes)
            boxes, members = self._merge(boxes, members)
        for group, labels in enumerate(members, start=1):
            self._group_of[labels] = group
        windows = [
            self._window(place, group) for group, place in enumerate(self._around(boxes).tolist(), start=1)
        ]
        # small ones first: what they fill is known to the large ones, which see it smaller
        self.windows = sorted(
            windows, key=lambda window: (window.height * window.width, window.top, window.left)
        )

    def _cut(self, hole: np.ndarray, boxes: np.ndarray) -> list[np.ndarray]:
        """Cut holes that are too long for a window, but thin, at a grid; boxes [n,4] of the pieces of each.

        The pieces get labels of their own, and the box of what was cut becomes empty.
        """
        cell, count, found = self._max // 2, len(boxes), []
        for label, (top, left, bottom, right) in enumerate(boxes.tolist(), start=1):
            if max(bottom - top, right - left) <= cell:
                continue
            labels = self._labels[top:bottom, left:right]
            own = (labels == label) & hole[top:bottom, left:right]
            if 4 * _reach(own) > cell:
                continue
            pieces = []
            for y in range(0, bottom - top, cell):
                for x in range(0, right - left, cell):
                    piece = own[y : y + cell, x : x + cell]
                    if piece.any():
                        count += 1
                        labels[y : y + cell, x : x + cell][piece] = count
                        rows, columns = np.flatnonzero(piece.any(axis=1)), np.flatnonzero(piece.any(axis=0))
                        start = np.array([top + y + rows[0], left + x + columns[0]])
                        extent = np.array([np.ptp(rows) + 1, np.ptp(columns) + 1])
                        pieces.append([*start, *(start + extent)])
            boxes[label - 1] = 0
            found.append(np.array(pieces, np.int64))
        return found

    def own(self, window: Window) -> np.ndarray:
        """bool [h,w]: the neighbourhood of the holes that are filled from this window."""
        return np.asarray(self._group_of[self._labels[window.place]] == window.group)

    def _window(self, place: list[int], group: int) -> Window:
        top, left, bottom, right = place
        height, width = bottom - top, right - left
        scale = min(1.0, self._max / max(height, width))
        seen = max(1, round(height * scale)), max(1, round(width * scale))
        return Window(top, left, height, width, seen, group)

    def _around(self, boxes: np.ndarray) -> np.ndarray:
        """The window of each box: [n,4] of top, left, bottom, right."""
        low, high = boxes[:, :2], boxes[:, 2:]
        sides = np.maximum(2 * (high - low).max(axis=1, keepdims=True), self._size)
        rounded = -(-sides // STEP) * STEP
        sides = np.where(rounded <= self._max, rounded, sides)
        limits = np.array(self._shape)
        lengths = np.minimum(sides, limits)
        start = np.clip((low + high - lengths) // 2, 0, limits - lengths)
        return np.concatenate([start, start + lengths], axis=1)

    def _merge(self, boxes: np.ndarray, members: list[list[int]]) -> tuple[np.ndarray, list[list[int]]]:
        """One pass: each box takes in, nearest first, those whose windows overlap its own, while the window allows."""
        windows = self._around(boxes)
        waiting = np.ones(len(boxes), bool)
        found, groups = [], []
        for first in range(len(boxes)):
            if not waiting[first]:
                continue
            waiting[first] = False
            box, group = boxes[first], list(members[first])
            while True:
                window = self._around(box[None])[0]
                meets = (windows[:, :2] < window[2:]).all(axis=1) & (windows[:, 2:] > window[:2]).all(axis=1)
                near = np.flatnonzero(meets & waiting)
                if not len(near):
                    break
                unions = np.concatenate(
                    [np.minimum(boxes[near, :2], box[:2]), np.maximum(boxes[near, 2:], box[2:])], axis=1
                )
                around = self._around(unions)
                sides = (around[:, 2:] - around[:, :2]).max(axis=1)
                best = int(sides.argmin())
                if sides[best] > self._max:
                    break
                box = unions[best]
                group += members[near[best]]
                waiting[near[best]] = False
            found.append(box)
            groups.append(group)
        return np.array(found, np.int64).reshape(-1, 4), groups


def _components(hole: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int32 [H,W]: the number of the hole that a pixel is in or near, or 0; and the holes' boxes [n,4]."""
    padded = cv2.copyMakeBorder(hole.astype(np.uint8), NEAR, NEAR, NEAR, NEAR, cv2.BORDER_CONSTANT, value=0)
    grown = cv2.dilate(padded, np.ones((2 * NEAR + 1, 2 * NEAR + 1), np.uint8))
    _, labels, stats, _ = cv2.connectedComponentsWithStats(grown, connectivity=8)
    left, top, width, height = stats[1:, :4].astype(np.int64).T
    # padding and growth cancel at the top and left, and add up at the bottom and right
    boxes = np.stack([top, left, top + height - 2 * NEAR, left + width - 2 * NEAR], axis=1)
    return labels[NEAR:-NEAR, NEAR:-NEAR], boxes


def _reach(hole: np.ndarray) -> float:
    """Pixels from the innermost pixel of a hole to the nearest known one."""
    framed = cv2.copyMakeBorder(hole.astype(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    return float(cv2.distanceTransform(framed, cv2.DIST_L2, 3).max())


def shrink(image: np.ndarray, hole: np.ndarray, seen: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [h,w,3] and bool [h,w] at a smaller size: means over known pixels alone; hole where more than half is."""
    size = seen[::-1]
    known = np.where(hole[..., None], np.uint8(0), image)
    sums = cv2.resize(known, size, interpolation=cv2.INTER_AREA).astype(np.float32)
    share = cv2.resize((~hole).astype(np.float32), size, interpolation=cv2.INTER_AREA)
    small = np.clip(np.round(sums / np.maximum(share, 1e-6)[..., None]), 0, 255).astype(np.uint8)
    return small, share < 0.5


def shrink_marks(marks: np.ndarray, seen: tuple[int, int]) -> np.ndarray:
    """bool [h,w] at a smaller size: every pixel that a mark touches, so that no line is lost."""
    return np.asarray(cv2.resize(marks.astype(np.float32), seen[::-1], interpolation=cv2.INTER_AREA) > 0)


def enlarge(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [h,w,3] back at its window's size."""
    return np.asarray(cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC))
