"""Reads the mask and the drawing of a fill, at the photograph's size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from data_prep.images import PhotoError
from data_prep.mask_reading import describe_values, parse_hole_values, read_drawing, read_mask_and_matches
from data_prep.mask_values import AmbiguousMask
from data_prep.masks import looks_inverted, resize_mask
from pipelines.inference.photo_file import PhotoFile, read_matching_frame


def read_hole(
    path: Path,
    photo: PhotoFile,
    invert: bool | None,
    dilate: int,
    frame: int | None,
    notes: list[str],
    warnings: list[str],
    values: Sequence[str] | None,
) -> np.ndarray:
    """The hole, bool [H,W], at the photograph's size; appends to `notes` and `warnings`."""
    data = read_matching_frame(path, "mask", photo, frame)
    hole_values = () if values is None else parse_hole_values(values)
    try:
        mask, matched = read_mask_and_matches(data, bool(invert), hole=hole_values)
        if unmatched := [value.text for index, value in enumerate(hole_values) if index not in matched]:
            raise ValueError(
                f"--hole {unmatched[0]} is not in the mask {path}: it has {describe_values(data)}"
            )
    except AmbiguousMask as error:
        raise ValueError(f"the mask {path}: {error}; choose one with --hole VALUE") from None
    except PhotoError as error:
        raise ValueError(f"the mask {path} cannot be read: {error}") from None
    hole = _match_size(mask, photo, f"the mask {path}", notes) > 0
    if invert is None and not hole_values and hole.any() and looks_inverted(hole.astype(np.uint8)):
        warnings.append(
            f"the mask looks inverted ({hole.mean():.0%} of it is hole: white means hole); --invert-mask swaps it"
        )
    if not hole.any():
        warnings.append("the mask is empty: nothing is filled (white means hole; --invert-mask swaps it)")
    if dilate:
        disk = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * dilate + 1, 2 * dilate + 1))
        hole = cv2.dilate(hole.astype(np.uint8), disk) > 0
    if hole.all():
        raise ValueError(f"the mask {path} covers the whole photograph: no pixel is known; try --invert-mask")
    return hole


def read_user_edges(path: Path, photo: PhotoFile, frame: int | None, notes: list[str]) -> np.ndarray:
    """bool [H,W] of a line drawing, dark on light or light on dark: the rarer value is the line."""
    try:
        drawing = read_drawing(read_matching_frame(path, "drawing", photo, frame))
    except PhotoError as error:
        raise ValueError(f"--edges {path} cannot be read: {error}") from None
    lines = _match_size(drawing, photo, f"the drawing {path}", notes) > 0
    return ~lines if lines.mean() > 0.5 else lines


def _match_size(mask: np.ndarray, photo: PhotoFile, name: str, notes: list[str]) -> np.ndarray:
    """The mask, transposed and resized like the photograph; ValueError if its aspect ratio differs."""
    height, width = photo.rgb.shape[:2]
    transpose = photo.transpose
    if mask.shape != (height, width) and transpose is not None and _same_aspect(mask.shape, (width, height)):
        mask = np.asarray(Image.fromarray(mask).transpose(transpose))
        notes.append(f"{name} is turned like the photograph")
    if mask.shape == (height, width):
        return mask
    size = f"{mask.shape[1]}x{mask.shape[0]}"
    if not _same_aspect(mask.shape, (height, width)):
        raise ValueError(
            f"{name} is {size} px, the photograph {width}x{height}: their aspect ratios must match"
        )
    notes.append(f"{name} is {size} px: resized to the photograph's {width}x{height}")
    return resize_mask(mask, height, width)


def _same_aspect(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether both shapes have the same aspect ratio, up to the rounding of a side to whole pixels."""
    (a, b), (h, w) = one[:2], other[:2]
    return abs(a * w / h - b) <= 1 or abs(b * h / w - a) <= 1
