"""Scores of a completed photograph. Papers use one word for several formulas, so each name here states its formula
(in full in METRIC_DEFINITIONS). A score is left out, not approximated, if the image is too small for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

METRIC_DEFINITIONS = {
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

LPIPS_METRICS = {"lpips_alex": "alexnet", "lpips_vgg": "vgg16"}
"""Metric per photograph -> its network."""
INCEPTION_METRICS = ("fid", "kid_inception", "p_ids_percent", "u_ids_percent")
"""Metrics of the whole set of photographs, on the features of FID's Inception v3."""
DISTANCE_METRICS = ("fd", "kid")
"""Metrics of the whole set of photographs, on the features of `evaluate.distance`."""
FEATURE_NETWORKS = LPIPS_METRICS | dict.fromkeys(INCEPTION_METRICS, "inception")
"""Metric -> the network of `evaluate.features` that it needs."""
UNFINISHED = "not every photograph was completed"
"""Why a method has no metric of the whole set."""
SET_METRICS = (*DISTANCE_METRICS, *INCEPTION_METRICS)

OPTIONAL_DEFINITIONS = {
    "lpips_alex": "LPIPS v0.1 on AlexNet, RGB, whole picture (Zhang et al. 2018)",
    "lpips_vgg": "LPIPS v0.1 on VGG-16, RGB, whole picture (Zhang et al. 2018)",
    "edge_precision": "fraction of the generated edge pixels in the hole that are true Canny edges",
    "edge_recall": "fraction of the true Canny edge pixels in the hole that are generated",
    "edge_f1": "harmonic mean of edge_precision and edge_recall",
    "edge_precision_1px": "edge_precision that accepts a true edge one pixel away in the hole, diagonally too",
    "edge_recall_1px": "edge_recall that accepts a generated edge one pixel away in the hole, diagonally too",
    "edge_f1_1px": "harmonic mean of edge_precision_1px and edge_recall_1px",
}
"""Scores per photograph that only some evaluations have. They are not part of a protocol's digest: evaluations with and
without them have the same other scores."""
SET_DEFINITIONS = {
    "fd": "Frechet distance of the features of crops (`evaluate.distance`); not FID",
    "kid": "kernel distance of the features of crops (`evaluate.distance`), shown as KD; not KID",
    "fid": "Frechet distance of the features of the pictures on FID's Inception v3 (Heusel et al. 2017)",
    "kid_inception": "kernel distance of the same features, shown as KID (Binkowski et al. 2018)",
    "p_ids_percent": "P-IDS: 100 * fraction of pairs whose filled picture a linear SVM on the same features takes for more "
    "real than its photograph (Zhao et al. 2021)",
    "u_ids_percent": "U-IDS: 100 * fraction of the pictures and photographs that this SVM takes for the other kind "
    "(Zhao et al. 2021)",
}
"""Scores of a set of photographs."""

METRIC_COLUMNS = (  # heading, metric, decimals
    ("PSNR hole", "psnr_rgb_hole", 2),
    ("PSNR", "psnr_rgb", 2),
    ("SSIM", "ssim_gauss11_rgb", 4),
    ("l1 %", "l1_percent", 3),
    ("l2 %", "l2_percent", 3),
    ("TV %", "tv_percent", 2),
)
"""The columns of the main tables."""
FEATURE_COLUMNS = (
    ("LPIPS alex", "lpips_alex", 4),
    ("LPIPS vgg", "lpips_vgg", 4),
    ("FID", "fid", 2),
    ("KID", "kid_inception", 5),
    ("P-IDS %", "p_ids_percent", 2),
    ("U-IDS %", "u_ids_percent", 2),
)
"""The columns of the tables of scores on published networks."""
EDGE_COLUMNS = (
    ("precision", "edge_precision", 3),
    ("recall", "edge_recall", 3),
    ("F1", "edge_f1", 3),
    ("precision 1px", "edge_precision_1px", 3),
    ("recall 1px", "edge_recall_1px", 3),
    ("F1 1px", "edge_f1_1px", 3),
)
"""The columns of the tables of generated edges."""
ALL_COLUMNS = (
    *METRIC_COLUMNS,
    ("FD", "fd", 2),
    ("KD", "kid", 4),
    *FEATURE_COLUMNS,
    *((f"edge {heading}", metric, decimals) for heading, metric, decimals in EDGE_COLUMNS),
)
"""Every metric that tables show, with a heading that is clear by itself."""
SUMMARY_METRICS = tuple(
    metric
    for _, metric, _ in ALL_COLUMNS
    if not metric.startswith("edge_") or metric in ("edge_f1", "edge_f1_1px")
)
"""The metrics of tables with one line per version."""


def higher_is_better(metric: str) -> bool:
    """True for PSNR, SSIM, edge scores, P-IDS and U-IDS, False for errors and distances."""
    return metric.startswith(("psnr", "ssim", "edge_", "p_ids", "u_ids"))


def image_metrics(truth: np.ndarray, result: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    """The scores of a result against the ground truth (both uint8 [H,W,3]), with its mask [H,W] (1 = hole).

    Names and formulas are those of METRIC_DEFINITIONS. An exact result has an infinite PSNR. Scores that do not exist
    are left out: `_hole` without a hole, SSIM of an image smaller than its window, relative_l1 of a black truth.
    """
    _check_inputs(truth, result, mask)
    hole = mask.astype(bool)
    a, b = truth / 255.0, result / 255.0
    from skimage.color import rgb2gray  # in here: look-ups in the registry need only the metrics' names

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
    scores.update(_ssim_scores(truth, result, grey_a, grey_b, hole))
    return {name: float(scores[name]) for name in METRIC_DEFINITIONS if name in scores}


def total_variation(image: np.ndarray, hole: np.ndarray | None = None) -> float:
    """mean|dx| + mean|dy| of an image [H,W,3]; with a hole, over the differences that have an end in it."""
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


def finite_mean(values: Iterable[float]) -> tuple[float, int]:
    """The mean of the finite values, and the number of infinite ones (exact results).

    One infinite PSNR would make every mean infinite; leaving it out can only understate a method. If all values are
    infinite, so is the mean. Raises ValueError without values.
    """
    array = np.asarray(list(values), dtype=np.float64)
    if not array.size:
        raise ValueError("no values to take a mean of")
    finite = array[np.isfinite(array)]
    return (float(finite.mean()) if finite.size else math.inf), int(array.size - finite.size)


def _ssim_scores(
    truth: np.ndarray, result: np.ndarray, grey_a: np.ndarray, grey_b: np.ndarray, hole: np.ndarray
) -> dict[str, float]:
    from skimage.metrics import structural_similarity

    scores = {}
    side = min(truth.shape[:2])
    if side >= 11:
        mean, per_pixel = structural_similarity(
            truth,
            result,
            gaussian_weights=True,  # truncated at 3.5 sigma: 11 pixels, as in Wang et al.
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


def _check_inputs(truth: np.ndarray, result: np.ndarray, mask: np.ndarray) -> None:
    for name, image in (("truth", truth), ("result", result)):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"{name} is {image.dtype} {list(image.shape)}: give uint8 [H,W,3]")
    if truth.shape != result.shape or truth.shape[:2] != mask.shape:
        raise ValueError(
            f"truth {list(truth.shape)}, result {list(result.shape)} and mask {list(mask.shape)} differ in size"
        )
