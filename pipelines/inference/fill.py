"""Fill the hole of one photograph of any size and mode; all other pixels stay unchanged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipelines.inference import writing
from pipelines.inference.fill_checks import hole_warning, seam_warning, tile_warning
from pipelines.inference.fill_inputs import read_hole, read_user_edges
from pipelines.inference.photo_file import PhotoFile, read_photo_file
from pipelines.inference.seam import measure_seam
from pipelines.inference.tiles import (
    DEFAULT_MAX_TILE_SIZE,
    MIN_TILE_SIZE,
    Tile,
    TilePlan,
    downscale,
    downscale_mask,
    upscale,
)

if TYPE_CHECKING:
    # imports torch and MLflow, which takes seconds
    from pipelines.registry.loaded_model import LoadedModel


MAX_LISTED = 6  # tiles described one by one in the report


@dataclass(frozen=True)
class FilledTile:
    """One model call: position and size of the tile in the photograph's pixels."""

    left: int
    top: int
    width: int
    height: int
    model_size: tuple[int, int]
    """(width, height) of the model's input."""


@dataclass(frozen=True)
class FillResult:
    """The report of a fill."""

    out_path: str
    """The written file."""
    hole_percent: float
    """Area of the hole in percent of the photograph, to two decimals."""
    tiles: tuple[FilledTile, ...]
    notes: tuple[str, ...]
    """Sentences about what was changed, kept or left out."""
    warnings: tuple[str, ...]
    report_lines: tuple[str, ...]
    """Lines for a terminal, with size, notes, tiles and warnings."""


@dataclass
class FillTask:
    """Everything that a fill needs except its model: the photograph is read, the output path is checked."""

    image_path: Path
    out_path: Path
    photo: PhotoFile
    hole: np.ndarray
    """bool [H,W]."""
    max_tile_size: int
    edges_path: Path | None
    user_edges: np.ndarray | None
    """bool [H,W]."""
    notes: list[str]
    warnings: list[str]


def fill(
    model: LoadedModel,
    image_path: str | Path,
    mask_path: str | Path,
    out_path: str | Path,
    *,
    invert: bool | None = None,
    dilate: int = 0,
    max_tile_size: int = DEFAULT_MAX_TILE_SIZE,
    blend: bool = False,
    edges_path: str | Path | None = None,
    frame: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    hole_values: Sequence[str] | None = None,
) -> FillResult:
    """`prepare_fill` and `run_fill`, whose docstrings describe the arguments and errors."""
    task = prepare_fill(
        image_path,
        mask_path,
        out_path,
        invert=invert,
        dilate=dilate,
        max_tile_size=max_tile_size,
        edges_path=edges_path,
        frame=frame,
        hole_values=hole_values,
    )
    return run_fill(model, task, blend=blend, progress=progress)


def prepare_fill(
    image_path: str | Path,
    mask_path: str | Path,
    out_path: str | Path,
    *,
    invert: bool | None = None,
    dilate: int = 0,
    max_tile_size: int = DEFAULT_MAX_TILE_SIZE,
    edges_path: str | Path | None = None,
    frame: int | None = None,
    hole_values: Sequence[str] | None = None,
) -> FillTask:
    """Read and check all files before a model is loaded.

    The mask is any image. White (above half) is the hole, or the non-black one of two colours, or the values in
    `hole_values`. `invert` swaps hole and known; None only warns if the mask looks inverted. `dilate` grows the hole
    by that many pixels. Each hole is filled in a tile around it, twice its bounding box and at least the model's
    training size, downscaled to at most `max_tile_size`. `edges_path` is a line drawing of the photograph's size;
    the model follows its lines inside the hole. `frame`, from 1, is required if the file has several frames.
    ValueError in one line: a file is unreadable, sizes do not match, or `out_path` is not writable.
    """
    image_path, mask_path, out_path = Path(image_path), Path(mask_path), Path(out_path)
    edges_file = None if edges_path is None else Path(edges_path)
    if max_tile_size < MIN_TILE_SIZE:
        raise ValueError(f"--max-tile-size {max_tile_size}: at least {MIN_TILE_SIZE} pixels")
    if dilate < 0:
        raise ValueError(f"--dilate {dilate}: 0 or more pixels")
    warnings = writing.check_output_path(
        out_path, [path for path in (image_path, mask_path, edges_file) if path]
    )
    photo = read_photo_file(image_path, frame)
    notes = photo.notes
    hole = read_hole(mask_path, photo, invert, dilate, frame, notes, warnings, hole_values)
    user_edges = None if edges_file is None else read_user_edges(edges_file, photo, frame, notes)
    photo.fit_range(~hole)
    writing.convert_for_format(photo, out_path)
    return FillTask(image_path, out_path, photo, hole, max_tile_size, edges_file, user_edges, notes, warnings)


def run_fill(
    model: LoadedModel,
    task: FillTask,
    *,
    blend: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> FillResult:
    """Fill the hole and write the photograph.

    Known pixels stay bit-identical as far as the output format can store them; `notes` list what it cannot.
    `blend` removes the seam at the border of the hole (Poisson blending). `progress(done, total)` counts tiles.
    ValueError in one line, before anything is written: the model cannot fill the hole or takes no edges.
    """
    photo, hole, notes, warnings = task.photo, task.hole, list(task.notes), list(task.warnings)
    if task.edges_path and not model.takes_edges:
        raise ValueError(f"--edges {task.edges_path}: {model.name} takes no edges")
    plan = TilePlan(hole, model.size or MIN_TILE_SIZE, task.max_tile_size)
    filled = _fill_tiles(model, photo.rgb, hole, task.user_edges, plan, blend, warnings, progress)
    pixels = photo.pixels.with_filled_hole(filled, hole)
    data = writing.encode_photo(pixels, photo.metadata, writing.output_format(task.out_path), notes)
    writing.write_atomically(task.out_path, data)

    percent = round(100 * float(hole.mean()), 2)
    height, width = hole.shape
    report_lines = [
        f"{task.image_path.name}: {width}x{height} px, {percent:g} % hole",
        *notes,
        *_describe_tiles(plan.tiles, hole.shape),
        *(f"warning: {warning}" for warning in warnings),
        f"wrote {task.out_path}",
    ]
    tiles = tuple(
        FilledTile(tile.left, tile.top, tile.width, tile.height, (tile.model_size[1], tile.model_size[0]))
        for tile in plan.tiles
    )
    return FillResult(str(task.out_path), percent, tiles, tuple(notes), tuple(warnings), tuple(report_lines))


def _fill_tiles(
    model: LoadedModel,
    rgb: np.ndarray,
    hole: np.ndarray,
    user_edges: np.ndarray | None,
    plan: TilePlan,
    blend: bool,
    warnings: list[str],
    progress: Callable[[int, int], None] | None,
) -> np.ndarray:
    """uint8 RGB [H,W,3], filled tile by tile; pixels filled in one tile are known to the next."""
    from models.blending import poisson_blend

    filled, remaining = rgb.copy(), hole.copy()
    fractions, seams = [], []
    for done, tile in enumerate(plan.tiles):
        if progress:
            progress(done, len(plan.tiles))
        crop, hole_in_tile = filled[tile.slices], remaining[tile.slices]
        own_holes = plan.own_holes(tile) & hole_in_tile
        edges_in_tile = None if user_edges is None else user_edges[tile.slices]
        try:
            result, fraction = _fill_tile(model, tile, crop, hole_in_tile, own_holes, edges_in_tile)
        except ValueError as error:
            raise ValueError(f"the hole at {_format_tile(tile)} cannot be filled: {error}") from None
        if blend:
            result = poisson_blend(
                crop,
                np.where(own_holes[..., None], result, crop),
                own_holes.astype(np.uint8),
                is_composite=True,
            )
        crop[own_holes] = result[own_holes]
        hole_in_tile[own_holes] = False
        fractions.append(fraction)
        if not blend:
            seams.append(measure_seam(crop, own_holes, hole_in_tile))
    if progress:
        progress(len(plan.tiles), len(plan.tiles))
    warnings += [*hole_warning(model, fractions), *tile_warning(model, plan.tiles), *seam_warning(seams)]
    return filled


def _fill_tile(
    model: LoadedModel,
    tile: Tile,
    crop: np.ndarray,
    hole: np.ndarray,
    own_holes: np.ndarray,
    user_edges: np.ndarray | None,
) -> tuple[np.ndarray, float]:
    """The completed tile, uint8 RGB [h,w,3], and the fraction of the model's input that was hole."""
    from models.classical import inpaint

    image, missing = crop, hole
    if tile.is_resized:
        image, missing = downscale(crop, hole, tile.model_size)
        own_holes = downscale_mask(own_holes, tile.model_size)
        user_edges = None if user_edges is None else downscale_mask(user_edges, tile.model_size)
    others = missing & ~own_holes
    if others.any() and model.hole_error(
        missing
    ):  # the model fills one box only: bridge the other holes first
        image, missing = inpaint(image, others.astype(np.uint8), "telea"), missing & own_holes
    edges = None
    if user_edges is not None and missing.any():
        edges = np.where(missing, user_edges, model.edges_outside_hole(image, missing))
    result, fraction = model.complete(image, missing, edges), float(missing.mean())
    return upscale(result, tile.height, tile.width) if tile.is_resized else result, fraction


def _describe_tiles(tiles: list[Tile], shape: tuple[int, ...]) -> list[str]:
    if len(tiles) == 1 and (tiles[0].height, tiles[0].width) == shape and not tiles[0].is_resized:
        return []
    lines = []
    for tile in tiles[:MAX_LISTED]:
        resizing = (
            f", resized to {tile.model_size[1]}x{tile.model_size[0]} and back" if tile.is_resized else ""
        )
        lines.append(f"filled in a tile of {_format_tile(tile)}{resizing}")
    if len(tiles) > MAX_LISTED:
        resized_count = sum(tile.is_resized for tile in tiles[MAX_LISTED:])
        lines.append(f"... and {len(tiles) - MAX_LISTED} more tiles, {resized_count} of them resized")
    return lines


def _format_tile(tile: Tile) -> str:
    return f"{tile.width}x{tile.height} px at ({tile.left}, {tile.top})"
