"""Poisson blending of a filled hole (Perez et al. 2003): GLCIC's post-processing (docs/papers.md 5.4), for any model."""

from __future__ import annotations

import numpy as np
from scipy import sparse
from scipy.sparse.linalg import splu

_NEIGHBOR_OFFSETS = ((0, 1), (0, -1), (1, 0), (-1, 0))


def poisson_blend(
    image: np.ndarray, filled: np.ndarray, mask: np.ndarray, *, is_composite: bool = False
) -> np.ndarray:
    """Blend `filled` into the hole without a seam: gradients from `filled`, boundary values from `image`.

    image, filled uint8 [H,W,3], mask [H,W] where nonzero = hole -> uint8 [H,W,3]. Known pixels are those of `image`,
    whose contents in the hole are not read. Solves the Poisson equation exactly on the hole's pixels with their four
    neighbours; the image border has no boundary condition (Neumann). If the hole covers everything there is no
    boundary: the result is `filled`.

    is_composite: what `filled` holds outside the hole. False: the network's output there too; its differences across
    the hole's boundary are kept like all others. True: `image`, as `complete` returns it. Then the step across
    the boundary is the seam itself (False would change nothing); it is replaced by the mean of the steps one pixel
    farther inside and one farther outside, where those lie in the hole and in the known pixels. ValueError: arrays
    of wrong types or shapes.
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
    # blended = filled + h; h has Laplacian 0, and its boundary values are image - filled: A h = b
    box = _padded_box(hole)
    matrix, b = _poisson_system(image[box], filled[box], hole[box], is_composite)
    h = splu(matrix, permc_spec="MMD_AT_PLUS_A", options={"SymmetricMode": True}).solve(b)
    out[hole] = np.clip((filled[hole] + h).round(), 0, 255).astype(np.uint8)
    return out


def _padded_box(hole: np.ndarray) -> tuple[slice, slice]:
    """The hole's bounding box and two pixels around it: all that the equation reads."""
    rows, columns = (np.flatnonzero(hole.any(axis)) for axis in (1, 0))
    return slice(max(rows[0] - 2, 0), rows[-1] + 3), slice(max(columns[0] - 2, 0), columns[-1] + 3)


def _poisson_system(
    image: np.ndarray, filled: np.ndarray, hole: np.ndarray, is_composite: bool
) -> tuple[sparse.csc_matrix, np.ndarray]:
    """The matrix [n,n] and right-hand side [n,3] for the n pixels of the hole, in row-major order."""
    height, width = hole.shape
    n = int(hole.sum())
    number = np.zeros(hole.shape, np.int64)
    number[hole] = np.arange(n)
    target, source = image.astype(np.int32), filled.astype(np.int32)
    in_image, known = np.ones_like(hole), ~hole
    degree, b = np.zeros(n), np.zeros((n, 3))
    rows, columns = [], []
    for dy, dx in _NEIGHBOR_OFFSETS:

        def shifted(values: np.ndarray, steps: int, dy: int = dy, dx: int = dx) -> np.ndarray:
            """Values that many steps from each pixel of the hole; 0 outside the image."""
            padded = np.pad(values, [(2, 2), (2, 2)] + [(0, 0)] * (values.ndim - 2))
            y, x = 2 + steps * dy, 2 + steps * dx
            return padded[y : y + height, x : x + width][hole]

        degree += shifted(in_image, 1)
        next_in_hole, at_boundary = shifted(hole, 1), shifted(known, 1)
        rows.append(np.flatnonzero(next_in_hole))
        columns.append(shifted(number, 1)[next_in_hole])
        p, q = shifted(source, 0), shifted(target, 1)
        if is_composite:
            outer, inner = shifted(known, 2)[:, None], shifted(hole, -1)[:, None]
            step_sum = outer * (q - shifted(target, 2)) + inner * (shifted(source, -1) - p)  # both inwards
            difference = q + step_sum / np.maximum(outer.astype(int) + inner, 1) - p
        else:
            difference = q - shifted(source, 1)
        b[at_boundary] += difference[at_boundary]
    i, j = np.concatenate([np.arange(n), *rows]), np.concatenate([np.arange(n), *columns])
    values = np.concatenate([degree, -np.ones(len(i) - n)])
    return sparse.csc_matrix((values, (i, j)), shape=(n, n)), b
