"""Fill the hole of one photograph, of any size and mode, and leave every other pixel as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from data_prep.masks import looks_inverted, read_mask
from data_prep.sources import PhotoError
from models.blending import poisson_blend
from models.classical import inpaint
from pipelines.filling.loading import LoadedModel
from pipelines.filling.photograph import (
    Photograph,
    check_target,
    read_bytes,
    read_photograph,
    write_photograph,
)
from pipelines.filling.windows import Plan, Window, enlarge, shrink, shrink_marks

LEAST_SIDE = 32  # pixels
SHOWN = 6  # windows that are described one by one


def fill(
    model: LoadedModel,
    image_path: str | Path,
    mask_path: str | Path,
    out_path: str | Path,
    *,
    invert: bool | None = None,
    dilate: int = 0,
    max_side: int = 512,
    blend: bool = False,
    edges_path: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Complete the photograph and write it to `out_path`; returns what was done, `lines` in words.

    The mask is any image: white (above half) = hole; `invert` turns it round, None says when it looks inverted.
    `dilate` grows the hole by so many pixels. What lies far from a hole is not looked at: each hole is filled in a
    window twice its box, at least the model's training size, seen no larger than `max_side`. `edges_path` is a drawing,
    as large as the photograph, whose lines inside the hole are followed. `blend` shifts the fill's colours so that no
    seam is left at its border (Poisson). `progress(done, windows)`.
    Keys: out, hole_percent, windows, notes, warnings, lines. ValueError in one line, before anything is written:
    files that cannot be read or do not go together, a hole that the model cannot fill.
    """
    image_path, mask_path, out_path = Path(image_path), Path(mask_path), Path(out_path)
    if max_side < LEAST_SIDE:
        raise ValueError(f"--max-side {max_side}: at least {LEAST_SIDE} pixels")
    if dilate < 0:
        raise ValueError(f"--dilate {dilate}: 0 or more pixels")
    sources = [path for path in (image_path, mask_path, edges_path and Path(edges_path)) if path]
    warnings = check_target(out_path, sources)
    photo = read_photograph(image_path)
    notes = list(photo.notes)
    hole = _read_hole(mask_path, photo, invert, dilate, notes, warnings)
    lines = None if edges_path is None else _read_lines(Path(edges_path), photo, model, notes)

    plan = Plan(hole, model.size or LEAST_SIDE, max_side)
    filled = _fill_windows(model, photo.rgb, hole, lines, plan, blend, warnings, progress)
    write_photograph(out_path, photo.completed(filled, hole), photo.profile)

    percent = round(100 * float(hole.mean()), 2)
    height, width = hole.shape
    said = [
        f"{image_path.name}: {width}x{height} px, {percent:g} % hole",
        *notes,
        *_describe(plan.windows, hole.shape),
        *(f"warning: {warning}" for warning in warnings),
        f"wrote {out_path}",
    ]
    return {
        "out": str(out_path),
        "hole_percent": percent,
        "windows": [
            {
                "left": w.left,
                "top": w.top,
                "width": w.width,
                "height": w.height,
                "seen": [w.seen[1], w.seen[0]],
            }
            for w in plan.windows
        ],
        "notes": notes,
        "warnings": warnings,
        "lines": said,
    }


def _fill_windows(
    model: LoadedModel,
    rgb: np.ndarray,
    hole: np.ndarray,
    lines: np.ndarray | None,
    plan: Plan,
    blend: bool,
    warnings: list[str],
    progress: Callable[[int, int], None] | None,
) -> np.ndarray:
    """uint8 RGB [H,W,3], window by window: what one has filled is known to the next."""
    filled, left = rgb.copy(), hole.copy()
    trained = model.metadata.get("hole_range")
    most = float(trained[1]) if trained else 1.0
    shares = []
    for done, window in enumerate(plan.windows):
        if progress:
            progress(done, len(plan.windows))
        crop, missing = filled[window.place], left[window.place]
        own = plan.own(window) & missing
        drawn = None if lines is None else lines[window.place]
        try:
            result, share = _look(model, window, crop, missing, own, drawn)
        except ValueError as error:
            raise ValueError(f"the hole at {_place(window)} cannot be filled: {error}") from None
        if blend:
            result = poisson_blend(
                crop, np.where(own[..., None], result, crop), own.astype(np.uint8), composed=True
            )
        crop[own] = result[own]
        missing[own] = False
        shares.append(share)
    if progress:
        progress(len(plan.windows), len(plan.windows))
    large = [share for share in shares if share > 1.05 * most]
    if large:
        warnings.append(
            f"the hole is larger than {model.name} was trained for: {max(large):.0%} of its window, trained up to "
            f"{most:.0%}; expect a worse fill"
        )
    return filled


def _look(
    model: LoadedModel,
    window: Window,
    crop: np.ndarray,
    missing: np.ndarray,
    own: np.ndarray,
    drawn: np.ndarray | None,
) -> tuple[np.ndarray, float]:
    """One window completed, uint8 RGB [h,w,3], and the share of it that was a hole to the model."""
    seen, gap = crop, missing
    if window.resized:
        seen, gap = shrink(crop, missing, window.seen)
        own = shrink_marks(own, window.seen)
        drawn = None if drawn is None else shrink_marks(drawn, window.seen)
    others = gap & ~own
    if others.any() and model.refuses(gap):  # it can fill one box: the other holes are bridged first
        seen, gap = inpaint(seen, others.astype(np.uint8), "telea"), gap & own
    edge = None
    if drawn is not None and gap.any():
        edge = np.where(gap, drawn, model.known_edges(seen, gap))
    result, share = model.complete(seen, gap, edge), float(gap.mean())
    return enlarge(result, window.height, window.width) if window.resized else result, share


def _read_hole(
    path: Path, photo: Photograph, invert: bool | None, dilate: int, notes: list[str], warnings: list[str]
) -> np.ndarray:
    """bool [H,W] at the photograph's size."""
    data = read_bytes(path, "mask")
    try:
        mask = read_mask(data, invert=bool(invert))
    except PhotoError as error:
        raise ValueError(f"the mask {path} cannot be read: {error}") from None
    hole = _fit(mask, photo, f"the mask {path}", notes) > 0
    if invert is None and hole.any() and looks_inverted(hole.astype(np.uint8)):
        warnings.append(
            f"the mask looks inverted ({hole.mean():.0%} of it is hole: white means hole); --invert-mask turns it round"
        )
    if not hole.any():
        warnings.append(
            "the mask is empty: nothing is filled (white means hole; --invert-mask turns it round)"
        )
    if dilate:
        disk = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * dilate + 1, 2 * dilate + 1))
        hole = cv2.dilate(hole.astype(np.uint8), disk) > 0
    if hole.all():
        raise ValueError(
            f"the mask {path} makes everything a hole: nothing is left to go by; try --invert-mask"
        )
    return hole


def _read_lines(path: Path, photo: Photograph, model: LoadedModel, notes: list[str]) -> np.ndarray:
    """bool [H,W] of a line drawing, dark on light or light on dark: lines are what there is less of."""
    if not model.takes_edges:
        raise ValueError(f"--edges {path}: {model.name} takes no edges")
    try:
        drawing = read_mask(read_bytes(path, "drawing"), invert=False)
    except PhotoError as error:
        raise ValueError(f"--edges {path} cannot be read: {error}") from None
    lines = _fit(drawing, photo, f"the drawing {path}", notes) > 0
    return ~lines if lines.mean() > 0.5 else lines


def _fit(mask: np.ndarray, photo: Photograph, what: str, notes: list[str]) -> np.ndarray:
    """The mask at the photograph's size; ValueError when it is neither the same picture turned nor scaled."""
    height, width = photo.rgb.shape[:2]
    if mask.shape != (height, width) and photo.turn is not None and _same_form(mask.shape, (width, height)):
        mask = np.asarray(Image.fromarray(mask).transpose(photo.turn))
        notes.append(f"{what} is turned like the photograph")
    if mask.shape == (height, width):
        return mask
    given = f"{mask.shape[1]}x{mask.shape[0]}"
    if not _same_form(mask.shape, (height, width)):
        raise ValueError(
            f"{what} is {given} px, the photograph {width}x{height}: they must have the same form"
        )
    notes.append(f"{what} is {given} px: resized to the photograph's {width}x{height}")
    return np.asarray(cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST_EXACT))


def _same_form(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether one is the other scaled, up to the rounding of a side to whole pixels."""
    (a, b), (h, w) = one[:2], other[:2]
    return abs(a * w / h - b) <= 1 or abs(b * h / w - a) <= 1


def _describe(windows: list[Window], shape: tuple[int, ...]) -> list[str]:
    if len(windows) == 1 and (windows[0].height, windows[0].width) == shape and not windows[0].resized:
        return []
    said = []
    for window in windows[:SHOWN]:
        seen = f", resized to {window.seen[1]}x{window.seen[0]} and back" if window.resized else ""
        said.append(f"filled in a window of {_place(window)}{seen}")
    if len(windows) > SHOWN:
        resized = sum(window.resized for window in windows[SHOWN:])
        said.append(f"... and {len(windows) - SHOWN} more windows, {resized} of them resized")
    return said


def _place(window: Window) -> str:
    return f"{window.width}x{window.height} px at ({window.left}, {window.top})"
