"""Scores of a completed photograph. Papers use one word for several formulas, so every name here states its
protocol (DEFINITIONS says it in full); a score that a picture is too small for is left out, never approximated.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from skimage.color import rgb2gray
from skimage.metrics import structural_similarity

BANDS = ("0-10", "10-20", "20-30", "30-40", "40-50", "50-60", "60-100")

DEFINITIONS = {
    "l1_percent": "100 * mean|a - b| on [0, 1], RGB, whole picture (context encoder's mean L1)",
    "l1_percent_hole": "100 * mean|a - b| on [0, 1], RGB, over the hole's pixels",
    "l1_percent_known": "100 * mean|a - b| on [0, 1], RGB, over the known pixels: 0 for a method that keeps them",
    "l2_percent": "100 * mean (a - b)^2 on [0, 1], RGB, whole picture (context encoder's mean L2)",
    "l2_percent_hole": "100 * mean (a - b)^2 on [0, 1], RGB, over the hole's pixels",
    "relative_l1": "sum|a - b| / sum(truth), RGB, whole picture (the l1 error of DeepFill's tables)",
    "mae_edgeconnect_grey": "sum|a - b| / sum(a + b), grey, whole picture (EdgeConnect's MAE)",
    "psnr_rgb": "10 log10(1 / mean (a - b)^2) in dB on [0, 1], RGB, whole picture",
    "psnr_rgb_hole": "10 log10(1 / mean (a - b)^2) in dB on [0, 1], RGB, the mean square over the hole's pixels",
    "psnr_grey": "10 log10(1 / mean (a - b)^2) in dB on [0, 1], skimage's grey, whole picture (EdgeConnect's)",
    "ssim_gauss11_rgb": "SSIM, Gaussian window 11 with sigma 1.5, RGB, borders of 5 px left out",
    "ssim_gauss11_rgb_hole": "that SSIM's map (window 11, sigma 1.5, RGB) over the hole's pixels, borders of 5 px left out",
    "ssim_uniform51_grey": "SSIM, uniform window 51, grey, borders of 25 px left out (EdgeConnect's)",
    "tv_percent": "100 * (mean|dx| + mean|dy|) on [0, 1], RGB, of the result, whole picture",
    "tv_percent_hole": "100 * (mean|dx| + mean|dy|) on [0, 1], RGB, of the result, differences with an end in the hole",
}


def higher_is_better(metric: str) -> bool:
    """PSNR and SSIM are better high, errors and distances low."""
    return metric.startswith(("psnr", "ssim"))


def band_of(mask: np.ndarray) -> str:
    """The hole-area band of a mask [H,W] (1 = hole) in percent, open below and closed above: (lo, hi].

    In integers, so that a hole of exactly a fifth is "10-20" (partial convolution, section 4.1's bins).
    """
    holes = int(np.count_nonzero(mask))
    tenth = -(-10 * holes // mask.size)  # ceil(10 * area)
    return BANDS[min(max(tenth - 1, 0), len(BANDS) - 1)]


def image_metrics(truth: np.ndarray, result: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    """The scores of one result against its truth (both uint8 [H,W,3]) and hole (mask [H,W], 1 = hole).

    Names and formulas are those of DEFINITIONS. An exact result has an infinite PSNR. Scores that do not exist are
    left out: `_hole` ones without a hole, SSIM of a picture smaller than its window, relative_l1 of a black truth.
    """
    _check(truth, result, mask)
    hole = mask.astype(bool)
    a, b = truth / 255.0, result / 255.0
    grey_a, grey_b = rgb2gray(truth), rgb2gray(result)
    absolute, square = np.abs(a - b), (a - b) ** 2

    scores = {
        "l1_percent": 100 * absolute.mean(),
        "l2_percent": 100 * square.mean(),
        "psnr_rgb": _psnr(square.mean()),
        "psnr_grey": _psnr(((grey_a - grey_b) ** 2).mean()),
        "tv_percent": 100 * total_variation(b),
    }
    if a.any():
        scores["relative_l1"] = absolute.sum() / a.sum()
    if grey_a.any() or grey_b.any():
        scores["mae_edgeconnect_grey"] = np.abs(grey_a - grey_b).sum() / (grey_a + grey_b).sum()
    if not hole.all():
        scores["l1_percent_known"] = 100 * absolute[~hole].mean()
    if hole.any():
        scores["l1_percent_hole"] = 100 * absolute[hole].mean()
        scores["l2_percent_hole"] = 100 * square[hole].mean()
        scores["psnr_rgb_hole"] = _psnr(square[hole].mean())
        scores["tv_percent_hole"] = 100 * total_variation(b, hole)
    scores.update(_similarities(truth, result, grey_a, grey_b, hole))
    return {name: float(scores[name]) for name in DEFINITIONS if name in scores}


def total_variation(image: np.ndarray, hole: np.ndarray | None = None) -> float:
    """mean|dx| + mean|dy| of an image [H,W,3]; with a hole: over the differences with an end in it."""
    total = 0.0
    for axis in (0, 1):
        steps = np.abs(np.diff(image, axis=axis))
        if hole is not None:
            steps = steps[
                np.take(hole, range(1, hole.shape[axis]), axis)
                | np.take(hole, range(hole.shape[axis] - 1), axis)
            ]
        total += steps.mean() if steps.size else 0.0
    return total


def mean_of(values: Iterable[float]) -> tuple[float, int]:
    """The mean over photographs, and how many infinite values (exact results) it leaves out.

    An infinite PSNR would swallow every other photograph's; leaving it out can only understate a method. All
    infinite: infinity. No values: ValueError.
    """
    array = np.asarray(list(values), dtype=np.float64)
    if not array.size:
        raise ValueError("no values to take a mean of")
    finite = array[np.isfinite(array)]
    return (float(finite.mean()) if finite.size else math.inf), int(array.size - finite.size)


def _similarities(
    truth: np.ndarray, result: np.ndarray, grey_a: np.ndarray, grey_b: np.ndarray, hole: np.ndarray
) -> dict[str, float]:
    scores = {}
    side = min(truth.shape[:2])
    if side >= 11:
        mean, per_pixel = structural_similarity(
            truth,
            result,
            gaussian_weights=True,  # truncated at 3.5 sigma: 11 pixels, as Wang et al. have it
            sigma=1.5,
            use_sample_covariance=False,
            data_range=255,
            channel_axis=2,
            full=True,
        )
        scores["ssim_gauss11_rgb"] = mean
        inner = hole[5:-5, 5:-5]
        if inner.any():
            scores["ssim_gauss11_rgb_hole"] = per_pixel[5:-5, 5:-5][inner].mean()
    if side >= 51:
        scores["ssim_uniform51_grey"] = structural_similarity(grey_a, grey_b, win_size=51, data_range=1.0)
    return scores


def _psnr(mean_square: float) -> float:
    return math.inf if mean_square == 0 else -10 * math.log10(mean_square)


def _check(truth: np.ndarray, result: np.ndarray, mask: np.ndarray) -> None:
    for name, image in (("truth", truth), ("result", result)):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"{name} is {image.dtype} {list(image.shape)}: give uint8 [H,W,3]")
    if truth.shape != result.shape or truth.shape[:2] != mask.shape:
        raise ValueError(
            f"truth {list(truth.shape)}, result {list(result.shape)} and mask {list(mask.shape)} differ in size"
        )


def frechet_distance(real: np.ndarray, fake: np.ndarray) -> float:
    """The Frechet distance of two samples of features [n,d] under the Gaussian assumption; never negative or complex.

    It is called FID only on Inception features with their standard weights; on others name the layer. ValueError when
    n < 2d: the covariance of fewer samples says more about n than about the pictures.
    """
    real, fake = _samples(real, fake)
    return frechet_gaussians(
        real.mean(0), np.cov(real, rowvar=False), fake.mean(0), np.cov(fake, rowvar=False)
    )


def frechet_gaussians(mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray) -> float:
    """|m_a - m_b|^2 + tr(A + B - 2 (AB)^(1/2)) for means [d] and covariances A, B [d,d].

    tr (AB)^(1/2) = tr (A^(1/2) B A^(1/2))^(1/2), which is symmetric: two real eigen decompositions, with rounding's
    negative eigenvalues clipped, instead of a matrix square root that may come out complex.
    """
    cov_a, cov_b = np.atleast_2d(cov_a), np.atleast_2d(cov_b)
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0)).sum()
    distance = np.sum((mean_a - mean_b) ** 2) + np.trace(cov_a) + np.trace(cov_b) - 2 * cross
    return max(float(distance), 0.0)


def kernel_distance(
    real: np.ndarray, fake: np.ndarray, subset: int | None = None, subsets: int = 100, seed: int = 0
) -> tuple[float, float]:
    """KID: (mean, standard deviation) over subsets of the unbiased squared MMD with kernel (x.y / d + 1)^3.

    real and fake are features [n,d]; each subset draws `subset` of both without replacement (default: half of them,
    at most 1000; Binkowski et al. 2018). Unbiased, so it may be a little below zero. ValueError when n < 2d, as for
    the Frechet distance.
    """
    real, fake = _samples(real, fake)
    n = min(len(real), len(fake))
    size = min(n, subset or min(1000, max(2, n // 2)))
    rng = np.random.default_rng(seed)
    draws = [
        _mmd(
            real[rng.choice(len(real), size, replace=False)], fake[rng.choice(len(fake), size, replace=False)]
        )
        for _ in range(subsets)
    ]
    return float(np.mean(draws)), float(np.std(draws))


def _mmd(x: np.ndarray, y: np.ndarray) -> float:
    size, width = x.shape
    xx, yy, xy = (_cubic(a @ b.T / width + 1) for a, b in ((x, x), (y, y), (x, y)))
    within = xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)
    return float(within / (size * (size - 1)) - 2 * xy.mean())


def _cubic(values: np.ndarray) -> np.ndarray:
    return values * values * values  # ten times faster than values ** 3


def _samples(real: np.ndarray, fake: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    real, fake = np.asarray(real, dtype=np.float64), np.asarray(fake, dtype=np.float64)
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1]:
        raise ValueError(
            f"features {list(real.shape)} and {list(fake.shape)}: give two arrays [n,d] of the same d"
        )
    n, d = min(len(real), len(fake)), real.shape[1]
    if n < 2 * d:
        raise ValueError(
            f"{n} samples are too few for {d} dimensions (at least {2 * d}): "
            "use more photographs or crops, or a layer with fewer channels"
        )
    if not (np.isfinite(real).all() and np.isfinite(fake).all()):
        raise ValueError("features are not finite: a picture or the feature stack holds NaN or infinity")
    return real, fake
