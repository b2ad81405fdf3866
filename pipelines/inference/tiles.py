"""Tiles around the holes of a large photograph, downscaled for the model to at most a given size."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

MERGE_DISTANCE = 8  # pixels; holes closer than twice this are one hole
MIN_TILE_SIZE = 32  # pixels; the least that --max-tile-size takes
DEFAULT_MAX_TILE_SIZE = 512  # pixels, of a tile as model input
SIZE_STEP = 32  # pixels to which tile sizes are rounded up: every new size permanently costs the model memory


@dataclass(frozen=True)
class Tile:
    """A rectangle of the photograph, in pixels, and its size as model input."""

    top: int
    left: int
    height: int
    width: int
    model_size: tuple[int, int]
    """(height, width) after downscaling."""
    hole_group: int
    """The group of holes that this tile fills; other holes inside it have their own tiles."""

    @property
    def slices(self) -> tuple[slice, slice]:
        return slice(self.top, self.top + self.height), slice(self.left, self.left + self.width)

    @property
    def is_resized(self) -> bool:
        return self.model_size != (self.height, self.width)


class TilePlan:
    """Tiles that together cover every hole of a mask bool [H,W], in `tiles`, smallest first.

    A tile is a square, twice as long as the bounding box of its holes (rounded up) and at least `min_size`, clipped to
    the photograph. Overlapping tiles are merged if the merged tile is not longer than `max_size`. A tile longer than
    `max_size` is downscaled for the model; but a long thin hole (a scratch) is split into several.
    """

    def __init__(self, hole: np.ndarray, min_size: int, max_size: int) -> None:
        self._shape, self._min_size, self._max_size = hole.shape[:2], min_size, max_size
        self._labels, boxes = _label_holes(hole)
        boxes = np.concatenate([boxes, *self._split_long_holes(hole, boxes)])
        members = [[label] for label in range(1, len(boxes) + 1)]
        is_whole = boxes[:, 2] > 0  # split holes have an empty box
        boxes, members = boxes[is_whole], [label for label, whole in zip(members, is_whole) if whole]
        self._group_by_label = np.zeros(len(is_whole) + 1, np.int64)
        box_count = -1
        while box_count != len(boxes):
            box_count = len(boxes)
            boxes, members = self._merge_boxes(boxes, members)
        for group, labels in enumerate(members, start=1):
            self._group_by_label[labels] = group
        tiles = [
            self._make_tile(box, group) for group, box in enumerate(self._tile_boxes(boxes).tolist(), start=1)
        ]
        # small tiles first: large ones then see their filled pixels, downscaled
        self.tiles = sorted(tiles, key=lambda tile: (tile.height * tile.width, tile.top, tile.left))

    def _split_long_holes(self, hole: np.ndarray, boxes: np.ndarray) -> list[np.ndarray]:
        """Split holes that are too long for a tile, but thin, along a grid; return boxes [n,4] for each.

        The pieces get new labels; the box of a split hole becomes empty.
        """
        cell, count, new_boxes = self._max_size // 2, len(boxes), []
        for label, (top, left, bottom, right) in enumerate(boxes.tolist(), start=1):
            if max(bottom - top, right - left) <= cell:
                continue
            labels = self._labels[top:bottom, left:right]
            hole_in_box = (labels == label) & hole[top:bottom, left:right]
            if 4 * _max_hole_depth(hole_in_box) > cell:
                continue
            piece_boxes = []
            for y in range(0, bottom - top, cell):
                for x in range(0, right - left, cell):
                    piece = hole_in_box[y : y + cell, x : x + cell]
                    if piece.any():
                        count += 1
                        labels[y : y + cell, x : x + cell][piece] = count
                        rows, columns = np.flatnonzero(piece.any(axis=1)), np.flatnonzero(piece.any(axis=0))
                        start = np.array([top + y + rows[0], left + x + columns[0]])
                        extent = np.array([np.ptp(rows) + 1, np.ptp(columns) + 1])
                        piece_boxes.append([*start, *(start + extent)])
            boxes[label - 1] = 0
            new_boxes.append(np.array(piece_boxes, np.int64))
        return new_boxes

    def own_holes(self, tile: Tile) -> np.ndarray:
        """bool [h,w]: the holes that this tile fills, with a margin of MERGE_DISTANCE."""
        return np.asarray(self._group_by_label[self._labels[tile.slices]] == tile.hole_group)

    def _make_tile(self, box: list[int], group: int) -> Tile:
        top, left, bottom, right = box
        height, width = bottom - top, right - left
        scale = min(1.0, self._max_size / max(height, width))
        model_size = max(1, round(height * scale)), max(1, round(width * scale))
        return Tile(top, left, height, width, model_size, group)

    def _tile_boxes(self, boxes: np.ndarray) -> np.ndarray:
        """The tile of each box: [n,4] of top, left, bottom, right."""
        starts, ends = boxes[:, :2], boxes[:, 2:]
        sides = np.maximum(2 * (ends - starts).max(axis=1, keepdims=True), self._min_size)
        rounded = -(-sides // SIZE_STEP) * SIZE_STEP
        sides = np.where(rounded <= self._max_size, rounded, sides)
        limits = np.array(self._shape)
        lengths = np.minimum(sides, limits)
        start = np.clip((starts + ends - lengths) // 2, 0, limits - lengths)
        return np.concatenate([start, start + lengths], axis=1)

    def _merge_boxes(self, boxes: np.ndarray, members: list[list[int]]) -> tuple[np.ndarray, list[list[int]]]:
        """One pass: merge each box with those whose tiles overlap its own, smallest merged tile first, up to `max_size`."""
        tiles = self._tile_boxes(boxes)
        unmerged = np.ones(len(boxes), bool)
        merged, groups = [], []
        for first in range(len(boxes)):
            if not unmerged[first]:
                continue
            unmerged[first] = False
            box, group = boxes[first], list(members[first])
            while True:
                tile = self._tile_boxes(box[None])[0]
                overlaps = (tiles[:, :2] < tile[2:]).all(axis=1) & (tiles[:, 2:] > tile[:2]).all(axis=1)
                candidates = np.flatnonzero(overlaps & unmerged)
                if not len(candidates):
                    break
                unions = np.concatenate(
                    [np.minimum(boxes[candidates, :2], box[:2]), np.maximum(boxes[candidates, 2:], box[2:])],
                    axis=1,
                )
                union_tiles = self._tile_boxes(unions)
                sides = (union_tiles[:, 2:] - union_tiles[:, :2]).max(axis=1)
                best = int(sides.argmin())
                if sides[best] > self._max_size:
                    break
                box = unions[best]
                group += members[candidates[best]]
                unmerged[candidates[best]] = False
            merged.append(box)
            groups.append(group)
        return np.array(merged, np.int64).reshape(-1, 4), groups


def _label_holes(hole: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int32 [H,W], the label of the hole that a pixel is in or near, or 0; and the holes' boxes [n,4]."""
    padded = cv2.copyMakeBorder(
        hole.astype(np.uint8),
        MERGE_DISTANCE,
        MERGE_DISTANCE,
        MERGE_DISTANCE,
        MERGE_DISTANCE,
        cv2.BORDER_CONSTANT,
        value=0,
    )
    dilated = cv2.dilate(padded, np.ones((2 * MERGE_DISTANCE + 1, 2 * MERGE_DISTANCE + 1), np.uint8))
    _, labels, stats, _ = cv2.connectedComponentsWithStats(dilated, connectivity=8)
    left, top, width, height = stats[1:, :4].astype(np.int64).T
    # padding and dilation cancel at the top and left, and add up at the bottom and right
    boxes = np.stack(
        [top, left, top + height - 2 * MERGE_DISTANCE, left + width - 2 * MERGE_DISTANCE], axis=1
    )
    return labels[MERGE_DISTANCE:-MERGE_DISTANCE, MERGE_DISTANCE:-MERGE_DISTANCE], boxes


def _max_hole_depth(hole: np.ndarray) -> float:
    """Largest distance in pixels from a pixel of the hole to the nearest known pixel."""
    padded = cv2.copyMakeBorder(hole.astype(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    return float(cv2.distanceTransform(padded, cv2.DIST_L2, 3).max())


def downscale(
    image: np.ndarray, hole: np.ndarray, model_size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Downscale an image, uint8 [h,w,3], and its hole, bool [h,w].

    Averages only known pixels; a pixel is hole if more than half of its area is.
    """
    size = model_size[::-1]
    known = np.where(hole[..., None], np.uint8(0), image)
    sums = cv2.resize(known, size, interpolation=cv2.INTER_AREA).astype(np.float32)
    known_fraction = cv2.resize((~hole).astype(np.float32), size, interpolation=cv2.INTER_AREA)
    small = np.clip(np.round(sums / np.maximum(known_fraction, 1e-6)[..., None]), 0, 255).astype(np.uint8)
    return small, known_fraction < 0.5


def downscale_hole(hole: np.ndarray, model_size: tuple[int, int]) -> np.ndarray:
    """The hole, bool [h,w], that `downscale` returns."""
    known_fraction = cv2.resize((~hole).astype(np.float32), model_size[::-1], interpolation=cv2.INTER_AREA)
    return np.asarray(known_fraction < 0.5)


def downscale_mask(mask: np.ndarray, model_size: tuple[int, int]) -> np.ndarray:
    """Downscale a mask, bool [h,w]: a pixel is set if any part of it is, so that thin lines stay."""
    return np.asarray(cv2.resize(mask.astype(np.float32), model_size[::-1], interpolation=cv2.INTER_AREA) > 0)


def upscale(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Upscale uint8 [h,w,3] to the tile's size."""
    return np.asarray(cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC))
