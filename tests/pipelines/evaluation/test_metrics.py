"""Scores against hand arithmetic, skimage, closed forms and direct loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.linalg import sqrtm
from skimage.data import astronaut
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from data_prep.masks import HOLE_AREA_BANDS, hole_area_band
from pipelines.evaluation.distances import frechet_distance, gaussian_frechet_distance, kernel_distance
from pipelines.evaluation.metrics import METRIC_DEFINITIONS, finite_mean, image_metrics


def constant(level: int, size: int = 64) -> np.ndarray:
    return np.full((size, size, 3), level, dtype=np.uint8)


def centre_hole(size: int = 64) -> np.ndarray:
    mask = np.zeros((size, size), dtype=np.uint8)
    mask[size // 4 : -size // 4, size // 4 : -size // 4] = 1
    return mask


@pytest.fixture(scope="module")
def photograph() -> np.ndarray:
    return astronaut()[100:164, 180:244].copy()


@pytest.fixture(scope="module")
def damaged(photograph: np.ndarray) -> np.ndarray:
    noise = np.random.default_rng(0).integers(-40, 41, photograph.shape)
    noisy = np.clip(photograph.astype(int) + noise, 0, 255).astype(np.uint8)
    return np.where(centre_hole()[..., None] == 1, noisy, photograph)


def test_with_a_quarter_hole_errors_in_the_hole_are_four_times_those_of_the_whole_image():
    mask, truth = centre_hole(), constant(0)
    result = truth.copy()
    result[mask == 1] = 51  # an error of 0.2
    scores = image_metrics(truth, result, mask)
    assert scores["l1_percent_hole"] == pytest.approx(20)
    assert scores["l1_percent"] == pytest.approx(5)
    assert scores["l1_percent_known"] == 0
    assert scores["l2_percent_hole"] == pytest.approx(4)
    assert scores["l2_percent"] == pytest.approx(1)
    assert scores["psnr_rgb"] == pytest.approx(20)  # 10 log10(1 / 0.01)
    assert scores["psnr_rgb_hole"] == pytest.approx(10 * math.log10(1 / 0.04))
    assert scores["psnr_grey"] == pytest.approx(20)


def test_changed_known_pixels_have_a_score_of_their_own():
    truth, mask = constant(100), centre_hole()
    scores = image_metrics(truth, np.where(mask[..., None] == 1, truth, truth + 51).astype(np.uint8), mask)
    assert scores["l1_percent_known"] == pytest.approx(20)
    assert scores["l1_percent_hole"] == 0


def test_edgeconnect_mae_and_relative_l1_of_half_the_brightness():
    scores = image_metrics(constant(200), constant(100), centre_hole())
    assert scores["mae_edgeconnect_grey"] == pytest.approx(1 / 3)
    assert scores["relative_l1"] == pytest.approx(1 / 2)


def test_total_variation_of_a_ramp():
    ramp = np.broadcast_to(np.arange(64, dtype=np.uint8)[None, :, None] * 2, (64, 64, 3)).copy()
    scores = image_metrics(ramp, ramp, centre_hole())
    assert scores["tv_percent"] == pytest.approx(100 * 2 / 255)
    assert scores["tv_percent_hole"] == pytest.approx(100 * 2 / 255)
    diagonal = ramp // 2 + ramp.transpose(1, 0, 2) // 2
    assert image_metrics(ramp, diagonal, centre_hole())["tv_percent"] == pytest.approx(200 / 255)


def test_scores_agree_with_skimage(photograph: np.ndarray, damaged: np.ndarray):
    mask = centre_hole()
    scores = image_metrics(photograph, damaged, mask)
    assert scores["psnr_rgb"] == pytest.approx(peak_signal_noise_ratio(photograph, damaged))
    wang = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    mean, per_pixel = structural_similarity(photograph, damaged, channel_axis=2, full=True, **wang)
    assert scores["ssim_gauss11_rgb"] == pytest.approx(mean)
    assert scores["ssim_gauss11_rgb_hole"] == pytest.approx(per_pixel[mask == 1].mean())
    weights = np.array([0.2125, 0.7154, 0.0721]) / 255
    greys = photograph @ weights, damaged @ weights
    assert scores["ssim_uniform51_grey"] == pytest.approx(
        structural_similarity(*greys, win_size=51, data_range=1.0)
    )
    assert scores["psnr_grey"] == pytest.approx(peak_signal_noise_ratio(*greys, data_range=1.0))


def test_an_exact_result_has_infinite_psnr(photograph: np.ndarray):
    scores = image_metrics(photograph, photograph, centre_hole())
    assert scores["psnr_rgb"] == scores["psnr_rgb_hole"] == scores["psnr_grey"] == math.inf
    assert scores["ssim_gauss11_rgb"] == pytest.approx(1)
    assert scores["mae_edgeconnect_grey"] == scores["l1_percent"] == 0


def test_means_count_the_infinite_values_that_they_leave_out():
    assert finite_mean([20.0, math.inf, 30.0]) == (25.0, 1)
    assert finite_mean([math.inf, math.inf]) == (math.inf, 2)
    with pytest.raises(ValueError, match="no values"):
        finite_mean([])


def test_undefined_scores_are_left_out():
    small = image_metrics(constant(9, 40), constant(8, 40), np.zeros((40, 40), np.uint8))
    assert "ssim_uniform51_grey" not in small
    assert "ssim_gauss11_rgb" in small
    assert not any(name.endswith("_hole") for name in small)
    tiny = image_metrics(constant(0, 8), constant(1, 8), np.ones((8, 8), np.uint8))
    assert not {"ssim_gauss11_rgb", "l1_percent_known", "relative_l1"} & set(tiny)
    assert set(image_metrics(constant(9), constant(8), centre_hole())) == set(METRIC_DEFINITIONS)


def test_wrong_images_are_rejected_in_one_line():
    with pytest.raises(ValueError, match="result is float64"):
        image_metrics(constant(0), constant(0) / 255, centre_hole())
    with pytest.raises(ValueError, match="differ in size"):
        image_metrics(constant(0), constant(0), centre_hole(32))


@pytest.mark.parametrize(
    ("holes", "band"),
    [
        (0, 0),
        (1, 0),
        (10, 0),
        (11, 1),
        (20, 1),
        (21, 2),
        (30, 2),
        (50, 4),
        (51, 5),
        (60, 5),
        (61, 6),
        (100, 6),
    ],
)
def test_hole_area_bands_exclude_the_lower_and_include_the_upper_bound(holes: int, band: int):
    mask = np.zeros(100, np.uint8)
    mask[:holes] = 1
    assert hole_area_band(mask.reshape(10, 10)) == HOLE_AREA_BANDS[band]


def test_frechet_distance_of_known_gaussians():
    rng = np.random.default_rng(1)
    a, b = (m @ m.T for m in rng.normal(size=(2, 5, 5)))
    mean_a, mean_b = rng.normal(size=(2, 5))
    expected = np.sum((mean_a - mean_b) ** 2) + np.trace(a + b - 2 * sqrtm(a @ b).real)
    assert gaussian_frechet_distance(mean_a, a, mean_b, b) == pytest.approx(expected)
    diagonals = np.diag([1.0, 4.0]), np.diag([9.0, 1.0])  # (1-3)^2 + (2-1)^2
    assert gaussian_frechet_distance(np.zeros(2), diagonals[0], np.zeros(2), diagonals[1]) == pytest.approx(5)


def test_frechet_distance_of_samples():
    rng = np.random.default_rng(2)
    features, shift = rng.normal(size=(400, 6)), np.arange(6.0)
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(features, features + shift) == pytest.approx(shift @ shift)
    assert frechet_distance(features, 3 * features) == pytest.approx(
        4 * (np.trace(np.cov(features.T)) + np.sum(features.mean(0) ** 2))
    )


def test_frechet_distance_stays_real_on_degenerate_features():
    rank_one = np.random.default_rng(3).normal(size=(40, 1)) @ np.ones((1, 8))  # rank 1
    assert 0 <= frechet_distance(rank_one, rank_one) < 1e-6
    assert frechet_distance(np.zeros((40, 8)), np.ones((40, 8))) == pytest.approx(8)


def test_kernel_distance_against_a_direct_double_loop():
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(12, 3)), rng.normal(1, 1, size=(12, 3))

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return (a @ b / 3 + 1) ** 3

    pairs = [(i, j) for i in range(12) for j in range(12) if i != j]
    within = sum(kernel(x[i], x[j]) + kernel(y[i], y[j]) for i, j in pairs) / len(pairs)
    across = sum(kernel(a, b) for a in x for b in y) / 144
    assert kernel_distance(x, y, subset_size=12)[0] == pytest.approx(within - 2 * across)


def test_kernel_distance_of_samples_of_one_distribution_is_about_zero():
    rng = np.random.default_rng(5)
    same, spread = kernel_distance(rng.normal(size=(1000, 4)), rng.normal(size=(1000, 4)))
    other, _ = kernel_distance(rng.normal(size=(1000, 4)), rng.normal(0.5, 1, size=(1000, 4)))
    assert abs(same) < 0.05 < 10 * abs(same) + 0.2 < other
    assert spread > 0


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance])
def test_too_few_samples_are_rejected(distance):
    features = np.random.default_rng(6).normal(size=(15, 8))
    with pytest.raises(ValueError, match=r"15 samples are too few for 8 dimensions \(at least 16\)"):
        distance(features, features)
    with pytest.raises(ValueError, match="not finite"):
        distance(np.full((20, 2), np.nan), np.zeros((20, 2)))
