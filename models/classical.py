"""Inpainting without training, as baselines."""

from __future__ import annotations

import cv2
import numpy as np

_FLAGS = {"telea": cv2.INPAINT_TELEA, "navier_stokes": cv2.INPAINT_NS}
METHODS = tuple(_FLAGS)


def inpaint(image: np.ndarray, mask: np.ndarray, method: str, radius: float = 3.0) -> np.ndarray:
    """Fill the hole of image uint8 [H,W,3], where mask [H,W] is not 0; -> uint8 [H,W,3], known pixels unchanged.

    method: `telea` (Telea 2004, fast marching) or `navier_stokes` (Bertalmio et al. 2001); radius in pixels: how far
    each looks. A hole that leaves nothing known, which either would turn into noise, comes back mid-grey.
    ValueError: an unknown method, or arrays that do not go together.
    """
    if method not in _FLAGS:
        raise ValueError(f"unknown classical method {method!r}: there are {', '.join(METHODS)}")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or mask.shape != image.shape[:2]:
        raise ValueError(
            f"inpaint takes image uint8 [H,W,3] and mask [H,W], not {image.dtype} {image.shape} and {mask.shape}"
        )
    hole = mask != 0
    blanked = np.where(hole[..., None], np.uint8(128), image)
    if hole.all():
        return blanked
    # in 16 bits, which OpenCV does channel by channel: in 8 its Telea rounds every pixel on the way in and drifts,
    # 3 levels on a constant image
    channels = [
        cv2.inpaint(channel, hole.astype(np.uint8), radius, _FLAGS[method])
        for channel in cv2.split(blanked.astype(np.uint16) * 256)
    ]
    filled = np.clip((np.stack(channels, axis=2).astype(np.float32) / 256).round(), 0, 255).astype(np.uint8)
    return np.where(hole[..., None], filled, image)
