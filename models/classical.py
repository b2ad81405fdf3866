"""Classical inpainting without training, as baselines."""

from __future__ import annotations

import cv2
import numpy as np

_OPENCV_FLAGS = {"telea": cv2.INPAINT_TELEA, "navier_stokes": cv2.INPAINT_NS}
METHODS = (*_OPENCV_FLAGS, "patchmatch")


def inpaint(image: np.ndarray, mask: np.ndarray, method: str, radius: float = 3.0) -> np.ndarray:
    """Fill the hole of image uint8 [H,W,3], where mask [H,W] is nonzero; -> uint8 [H,W,3], known pixels unchanged.

    method: `telea` (Telea 2004, fast marching), `navier_stokes` (Bertalmio et al. 2001) or `patchmatch` (Barnes et
    al. 2009, with the coarse-to-fine completion of Wexler et al. 2007). radius, in pixels: the neighbourhood of telea
    and navier_stokes; for patchmatch, rounded, the half side of a patch. If the hole covers everything the result is
    mid-grey, where the methods would give noise. All methods are deterministic and thread-safe.
    ValueError: an unknown method, arrays of wrong types or shapes, or a hole that patchmatch cannot fill.
    """
    if method not in METHODS:
        raise ValueError(f"unknown classical method {method!r}: there are {', '.join(METHODS)}")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or mask.shape != image.shape[:2]:
        raise ValueError(
            f"inpaint takes image uint8 [H,W,3] and mask [H,W], not {image.dtype} {image.shape} and {mask.shape}"
        )
    hole = mask != 0
    blanked = np.where(hole[..., None], np.uint8(128), image)
    if hole.all():
        return blanked
    if method == "patchmatch":
        filled = _patchmatch(blanked, hole, max(1, round(radius)))
    else:
        filled = _opencv(blanked, hole, _OPENCV_FLAGS[method], radius)
    return np.where(hole[..., None], filled, image)


def _opencv(image: np.ndarray, hole: np.ndarray, flag: int, radius: float) -> np.ndarray:
    # in 16 bits, which OpenCV does per channel: with 8 bits its Telea rounds each pixel before the next one uses it, and
    # drifts by 3 levels on a constant image
    channels = [
        cv2.inpaint(channel, hole.astype(np.uint8), radius, flag)
        for channel in cv2.split(image.astype(np.uint16) * 256)
    ]
    return np.clip((np.stack(channels, axis=2).astype(np.float32) / 256).round(), 0, 255).astype(np.uint8)


def _patchmatch(image: np.ndarray, hole: np.ndarray, radius: int) -> np.ndarray:
    if not _pyramid_covers_hole(hole, radius):
        height, width = hole.shape
        raise ValueError(
            f"patchmatch cannot fill a hole of {hole.sum()} of {width}x{height} px with patches of radius {radius}: "
            "even at the coarsest level of its pyramid parts of the hole are unknown"
        )
    from patchmatch import patch_match  # a C library, loaded on first use

    patch_match.set_random_seed(0)  # each call starts from this seed: other code may have set another
    return patch_match.inpaint(image, hole, patch_size=radius)


def _pyramid_covers_hole(hole: np.ndarray, radius: int) -> bool:
    """Whether the coarsest level of PyPatchMatch's pyramid has a colour everywhere.

    The library starts there; where it has no colour it starts from black and seldom recovers. Each level has half the
    size of the one before: a pixel is the mean of the known pixels among 6x6. The last level is the first with a side
    of at most `radius`.
    """
    known: np.ndarray = (~hole).astype(np.uint8)
    while min(known.shape) > radius:
        known = cv2.dilate(known, np.ones((6, 6), np.uint8), anchor=(2, 2))[:-1:2, :-1:2]
    return bool(known.all())
