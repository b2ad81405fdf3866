"""What a fill would do, without the model's program: its tiles, its warnings, and the edges that the model sees."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import cv2
import numpy as np

from pipelines.inference.fill_checks import hole_warning, tile_warning
from pipelines.inference.tiles import (
    DEFAULT_MAX_TILE_SIZE,
    MIN_TILE_SIZE,
    Tile,
    TilePlan,
    downscale,
    downscale_hole,
    downscale_mask,
)

if TYPE_CHECKING:
    from pipelines.registry.loaded_model import ModelFacts


@dataclass(frozen=True)
class TileInput:
    """One model call of a fill."""

    tile: Tile
    hole: np.ndarray
    """bool [h,w] at the model's input size."""
    is_bridged: bool
    """Whether the other holes in the tile are filled by a classical method first: the model fills one box only."""

    @property
    def fraction(self) -> float:
        return float(self.hole.mean())


def tile_inputs(
    model: ModelFacts, hole: np.ndarray, max_tile_size: int = DEFAULT_MAX_TILE_SIZE
) -> Iterator[TileInput]:
    """The model calls, in the order of `run_fill`, for a hole bool [H,W]."""
    plan = TilePlan(hole, model.size or MIN_TILE_SIZE, max_tile_size)
    remaining = hole.copy()
    for tile in plan.tiles:
        missing = hole_in_tile = remaining[tile.slices]
        own = own_holes = plan.own_holes(tile) & hole_in_tile
        if tile.is_resized:
            missing = downscale_hole(hole_in_tile, tile.model_size)
            own = downscale_mask(own_holes, tile.model_size)
        is_bridged = bool((missing & ~own).any()) and model.hole_error(missing) is not None
        yield TileInput(tile, (missing & own) if is_bridged else missing.copy(), is_bridged)
        hole_in_tile[own_holes] = False


def check_fill(model: ModelFacts, inputs: list[TileInput]) -> list[str]:
    """Why the model cannot fill the hole, or the warnings that a fill would give before it is done."""
    for tile_input in inputs:
        if reason := model.hole_error(tile_input.hole):
            return [f"the hole cannot be filled: {reason}"]
    fractions = [tile_input.fraction for tile_input in inputs]
    return [*hole_warning(model, fractions), *tile_warning(model, [item.tile for item in inputs])]


def known_edges(
    model: ModelFacts, rgb: np.ndarray, hole: np.ndarray, max_tile_size: int = DEFAULT_MAX_TILE_SIZE
) -> np.ndarray:
    """bool [H,W]: the edges outside the hole as the model sees them, at its input's resolution, in the photograph.

    rgb: uint8 [H,W,3]. Without a hole, the whole photograph counts as one tile. Where a later tile sees pixels that
    an earlier one fills, the edges of these are missing. ValueError: the model's sigma is not on record.
    """
    edges = np.zeros(hole.shape, bool)
    if not hole.any():
        tile = _whole_photo(hole.shape, max_tile_size)
        return _tile_edges(model, tile, rgb, np.zeros(hole.shape, bool), None)
    for tile_input in tile_inputs(model, hole, max_tile_size):
        tile = tile_input.tile
        edges[tile.slices] |= _tile_edges(model, tile, rgb[tile.slices], hole[tile.slices], tile_input.hole)
    return edges & ~hole


def edges_inside(
    model: ModelFacts, rgb: np.ndarray, hole: np.ndarray, max_tile_size: int = DEFAULT_MAX_TILE_SIZE
) -> np.ndarray:
    """bool [H,W]: the photograph's own edges inside the hole, at the resolution and sigma that the model knows: what
    a person can start drawing from."""
    edges = np.zeros(hole.shape, bool)
    for tile_input in tile_inputs(model, hole, max_tile_size):
        tile = tile_input.tile
        nothing = np.zeros((tile.height, tile.width), bool)
        edges[tile.slices] |= _tile_edges(model, tile, rgb[tile.slices], nothing, None)
    return edges & hole


def _tile_edges(
    model: ModelFacts, tile: Tile, crop: np.ndarray, hole: np.ndarray, missing: np.ndarray | None
) -> np.ndarray:
    """bool [h,w] in the tile; `missing` is the hole at the model's input size, None: that of `hole`."""
    image, small_hole = downscale(crop, hole, tile.model_size) if tile.is_resized else (crop, hole)
    edges = model.edges_outside_hole(image, small_hole if missing is None else missing)
    if not tile.is_resized:
        return edges
    size = (tile.width, tile.height)
    return np.asarray(cv2.resize(edges.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST) > 0)


def _whole_photo(shape: tuple[int, ...], max_tile_size: int) -> Tile:
    height, width = shape[:2]
    scale = min(1.0, max_tile_size / max(height, width))
    return Tile(0, 0, height, width, (max(1, round(height * scale)), max(1, round(width * scale))), 0)
