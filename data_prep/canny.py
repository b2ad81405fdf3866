"""Canny edges as in EdgeConnect's training data: the results of skimage.feature.canny, several times faster.

Three details matter (docs/papers.md 4.3): the float blur is renormalised at the border and around holes, the thresholds
are 0.1 and 0.2 on Sobel's magnitude of an image in [0,1], and non-maximum suppression interpolates along the gradient.
"""

from __future__ import annotations

import functools

import cv2
import numpy as np

LOW_THRESHOLD, HIGH_THRESHOLD = 0.1, 0.2  # on the gradient magnitude of an image in [0,1]
_GRAY_WEIGHTS = (
    np.array([[0.2125, 0.7154, 0.0721]], np.float32) / 255
)  # skimage's rgb2gray, not OpenCV's weights


def canny_edges(image: np.ndarray, sigma: float, mask: np.ndarray | None = None) -> np.ndarray:
    """Edges as bool [H,W] of an image uint8 [H,W] or [H,W,3] (RGB).

    `sigma` is the Gaussian's standard deviation in pixels; 0 does not blur. With `mask` [H,W], non-zero = hole, the
    hole's contents have no influence, and there are no edges in the hole or next to it: skimage's mask=~hole. The
    image's outermost pixels are never edges. Raises ValueError for other types, shapes or a negative sigma.
    """
    if image.dtype != np.uint8 or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)):
        raise ValueError(f"canny_edges takes uint8 [H,W] or [H,W,3], not {image.dtype} {list(image.shape)}")
    if not 0 <= sigma < 1000:
        raise ValueError(f"sigma {sigma}: 0 (no blur) or a number of pixels above")
    if mask is not None and mask.shape != image.shape[:2]:
        raise ValueError(f"mask {list(mask.shape)} does not fit the image {list(image.shape[:2])}")
    gray = (
        cv2.transform(image.astype(np.float32), _GRAY_WEIGHTS)
        if image.ndim == 3
        else image * np.float32(1 / 255)
    )
    blurred, usable = _blur(gray.reshape(image.shape[:2]), float(sigma), mask)
    dy = cv2.Sobel(blurred, cv2.CV_32F, 0, 1, borderType=cv2.BORDER_REFLECT)
    dx = cv2.Sobel(blurred, cv2.CV_32F, 1, 0, borderType=cv2.BORDER_REFLECT)
    magnitude = cv2.magnitude(dy, dx)
    return _hysteresis(_suppress_non_maxima(dy, dx, magnitude, usable), magnitude)


def _blur(gray: np.ndarray, sigma: float, mask: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """(the blurred image, divided by the blurred validity; uint8 [H,W], 1 where no hole or border is adjacent)."""
    valid = np.ones(gray.shape, np.uint8) if mask is None else np.equal(mask, 0).astype(np.uint8)
    usable = cv2.erode(valid, np.ones((3, 3), np.uint8), borderType=cv2.BORDER_CONSTANT, borderValue=0)
    if mask is not None:
        gray = np.where(valid, gray, np.float32(0))
    if sigma == 0:
        return gray, usable
    kernel = _gaussian_kernel(sigma)
    blurred = cv2.sepFilter2D(gray, cv2.CV_32F, kernel, kernel, borderType=cv2.BORDER_CONSTANT)
    if mask is None:  # the blurred validity is then an outer product
        height, width = gray.shape
        blurred *= _border_gain(height, sigma)[:, None]
        blurred *= _border_gain(width, sigma)
        return blurred, usable
    blurred_validity = cv2.sepFilter2D(
        valid.astype(np.float32), cv2.CV_32F, kernel, kernel, borderType=cv2.BORDER_CONSTANT
    )
    return blurred / (blurred_validity + np.finfo(np.float32).eps), usable


@functools.lru_cache(maxsize=64)
def _gaussian_kernel(sigma: float) -> np.ndarray:
    """A Gaussian truncated at four sigma."""
    return cv2.getGaussianKernel(2 * int(4 * sigma + 0.5) + 1, sigma, cv2.CV_32F)


@functools.lru_cache(maxsize=256)
def _border_gain(length: int, sigma: float) -> np.ndarray:
    """float32 [length]: 1 / the fraction of the kernel that lies inside the image, for each position on an axis."""
    kernel = _gaussian_kernel(sigma)[:, 0]
    inside = np.convolve(np.ones(length), kernel, "full")[len(kernel) // 2 :][:length]
    return (1 / inside).astype(np.float32)


def _suppress_non_maxima(
    dy: np.ndarray, dx: np.ndarray, magnitude: np.ndarray, usable: np.ndarray
) -> np.ndarray:
    """uint8 [H,W], 1 where the magnitude is at least LOW_THRESHOLD and at least that of both neighbours along the
    gradient.

    Each neighbour is interpolated between the adjacent pixel on the gradient's longer axis and the diagonal pixel, by
    the ratio of the shorter component to the longer one. Computed on whole arrays: most pixels of a photograph are
    above LOW_THRESHOLD.
    """
    height, width = magnitude.shape
    maxima = np.zeros((height, width), np.uint8)
    if min(height, width) < 3:
        return maxima

    def neighbor(y: int, x: int) -> np.ndarray:
        return magnitude[1 + y : height - 1 + y, 1 + x : width - 1 + x]

    center, dy, dx = neighbor(0, 0), dy[1:-1, 1:-1], dx[1:-1, 1:-1]
    abs_dy, abs_dx = np.abs(dy), np.abs(dx)
    ratio = cv2.divide(cv2.min(abs_dy, abs_dx), cv2.max(abs_dy, abs_dx))
    steep = cv2.compare(abs_dy, abs_dx, cv2.CMP_GT)
    opposite_signs = np.less(dy * dx, 0).view(np.uint8)
    opposite_steep, opposite_flat = opposite_signs & steep, opposite_signs & ~steep
    keep = np.greater_equal(center, np.float32(LOW_THRESHOLD)).view(np.uint8) & usable[1:-1, 1:-1]
    adjacent, interpolated = np.empty_like(ratio), np.empty_like(ratio)
    for sign in (1, -1):
        adjacent[:] = neighbor(0, sign)
        cv2.copyTo(neighbor(sign, 0), steep, adjacent)
        interpolated[:] = neighbor(sign, sign)  # the diagonal pixel
        cv2.copyTo(neighbor(sign, -sign), opposite_steep, interpolated)
        cv2.copyTo(neighbor(-sign, sign), opposite_flat, interpolated)
        interpolated -= adjacent
        interpolated *= ratio
        interpolated += adjacent
        keep &= cv2.compare(interpolated, center, cv2.CMP_LE)
    maxima[1:-1, 1:-1] = keep  # usable is 0 or 1, so keep is too
    return maxima


def _hysteresis(maxima: np.ndarray, magnitude: np.ndarray) -> np.ndarray:
    """bool [H,W]: the connected components of `maxima` that have a pixel of at least HIGH_THRESHOLD."""
    count, labels = cv2.connectedComponents(maxima, connectivity=8, ltype=cv2.CV_32S)
    positions = np.flatnonzero(maxima.view(bool))
    component = labels.ravel()[positions]
    strong = np.zeros(count, bool)
    strong[component[magnitude.ravel()[positions] >= HIGH_THRESHOLD]] = True
    edges = np.zeros(maxima.shape, bool)
    edges.ravel()[positions] = strong[component]
    return edges
