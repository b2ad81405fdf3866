"""Poisson blending of a filled hole (Perez et al. 2003): the post-processing of GLCIC (papers.md 5.4), and of any
other completion."""

from __future__ import annotations

import numpy as np
from scipy import sparse
from scipy.sparse.linalg import splu

_DIRECTIONS = ((0, 1), (0, -1), (1, 0), (-1, 0))


def poisson_blend(
    image: np.ndarray, filled: np.ndarray, mask: np.ndarray, *, composed: bool = False
) -> np.ndarray:
    """`filled` in the hole, without a seam: the gradients are its own, the values at the hole's border `image`'s.

    image, filled uint8 [H,W,3], mask [H,W] where not 0 = hole -> uint8 [H,W,3]; known pixels are `image`'s, whose
    contents in the hole are not read. Solved exactly, in the hole's pixels with their four neighbours; the image's own
    border gives no condition (Neumann). A hole that covers everything has no border to fit: `filled` comes back.

    composed says what `filled` holds outside the hole. False: the network's own output there too, whose differences
    across the hole's border are kept like all others. True: `image`, as everything that completes returns it. Then
    the step across the border is the seam itself (with False nothing would change), and the step that belongs there
    is the mean of those one pixel farther in and farther out, where these are in the hole and known.
    ValueError: arrays that do not go together.
    """
    if (
        image.dtype != np.uint8
        or filled.dtype != np.uint8
        or image.ndim != 3
        or not image.shape == filled.shape == (*mask.shape, 3)
    ):
        shapes = f"{image.dtype} {image.shape}, {filled.dtype} {filled.shape} and {mask.shape}"
        raise ValueError(f"poisson_blend takes image and filled uint8 [H,W,3] and mask [H,W], not {shapes}")
    hole = mask != 0
    out = np.where(hole[..., None], filled, image)
    if hole.all() or not hole.any():
        return out
    # blended = filled + h, where h has no Laplacian and is at the border what `filled` lacks there: A h = b
    part = _around(hole)
    matrix, lacking = _system(image[part], filled[part], hole[part], composed)
    h = splu(matrix, permc_spec="MMD_AT_PLUS_A", options={"SymmetricMode": True}).solve(lacking)
    out[hole] = np.clip((filled[hole] + h).round(), 0, 255).astype(np.uint8)
    return out


def _around(hole: np.ndarray) -> tuple[slice, slice]:
    """The hole's box and two pixels around it: all that is looked at."""
    rows, columns = (np.flatnonzero(hole.any(axis)) for axis in (1, 0))
    return slice(max(rows[0] - 2, 0), rows[-1] + 3), slice(max(columns[0] - 2, 0), columns[-1] + 3)


def _system(
    image: np.ndarray, filled: np.ndarray, hole: np.ndarray, composed: bool
) -> tuple[sparse.csc_matrix, np.ndarray]:
    """The matrix [n,n] and right side [n,3] of the n pixels of the hole, row by row."""
    height, width = hole.shape
    n = int(hole.sum())
    number = np.zeros(hole.shape, np.int64)
    number[hole] = np.arange(n)
    colour, paint = image.astype(np.int32), filled.astype(np.int32)
    inside, known = np.ones_like(hole), ~hole
    degree, b = np.zeros(n), np.zeros((n, 3))
    rows, columns = [], []
    for dy, dx in _DIRECTIONS:

        def at(values: np.ndarray, steps: int, dy: int = dy, dx: int = dx) -> np.ndarray:
            """What lies so many steps from each pixel of the hole; 0 outside the image."""
            padded = np.pad(values, [(2, 2), (2, 2)] + [(0, 0)] * (values.ndim - 2))
            y, x = 2 + steps * dy, 2 + steps * dx
            return padded[y : y + height, x : x + width][hole]

        degree += at(inside, 1)
        next_too, border = at(hole, 1), at(known, 1)
        rows.append(np.flatnonzero(next_too))
        columns.append(at(number, 1)[next_too])
        p, q = at(paint, 0), at(colour, 1)
        if composed:
            outer, inner = at(known, 2)[:, None], at(hole, -1)[:, None]
            steps = outer * (q - at(colour, 2)) + inner * (at(paint, -1) - p)  # both inwards
            lacking = q + steps / np.maximum(outer.astype(int) + inner, 1) - p
        else:
            lacking = q - at(paint, 1)
        b[border] += lacking[border]
    i, j = np.concatenate([np.arange(n), *rows]), np.concatenate([np.arange(n), *columns])
    values = np.concatenate([degree, -np.ones(len(i) - n)])
    return sparse.csc_matrix((values, (i, j)), shape=(n, n)), b
