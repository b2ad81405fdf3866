"""Paired differences and their intervals, checked with the t interval and Efron's formulas; comparing two models."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import NormalDist

import cv2
import numpy as np
import pytest
from PIL import Image
from scipy import stats

from pipelines.evaluation.comparison import MIN_PAIRS, bca_interval, compare_methods, paired_difference
from pipelines.evaluation.comparison_table import format_comparison
from pipelines.evaluation.evaluate import evaluate
from pipelines.evaluation.methods import baseline_methods
from pipelines.recipe import EvaluationConfig
from pipelines.registry.model_comparison import compare_models
from support.mlflow_stores import PipelineOutputs


def efron(values: np.ndarray, level: float, resamples: int, seed: int) -> tuple[float, float]:
    """BCa after Efron (1987) and Efron and Tibshirani (1993, chapter 14), with its own resamples."""
    rng, n, normal = np.random.default_rng(seed), len(values), NormalDist()
    means = np.sort(values[rng.integers(0, n, (resamples, n))].mean(1))
    bias = normal.inv_cdf(float((means < values.mean()).mean()))
    jackknife = (values.sum() - values) / (n - 1)
    deviations = jackknife.mean() - jackknife
    acceleration = (deviations**3).sum() / (6 * (deviations**2).sum() ** 1.5)
    limits = []
    for quantile in ((1 - level) / 2, (1 + level) / 2):
        z = bias + normal.inv_cdf(quantile)
        limits.append(float(np.quantile(means, normal.cdf(bias + z / (1 - acceleration * z)))))
    return limits[0], limits[1]


def test_the_interval_is_that_of_efrons_formulas() -> None:
    values = np.random.default_rng(1).lognormal(
        size=60
    )  # skewed, so that BCa and the plain percentiles differ
    low, high = efron(values, 0.95, 40_000, 5)
    interval = bca_interval(values)
    assert interval is not None
    width = high - low
    assert interval == pytest.approx((low, high), abs=0.03 * width)
    centre = values.mean()
    assert high - centre > 1.2 * (centre - low), "it is skewed"


def test_the_interval_of_normal_differences_is_the_t_interval() -> None:
    rng = np.random.default_rng(2)
    a = rng.normal(20, 5, 200)
    b = a + rng.normal(0.3, 1, 200)
    difference = paired_difference(a.tolist(), b.tolist(), "psnr_rgb_hole", "center")
    assert difference is not None
    t = stats.ttest_rel(b, a).confidence_interval(0.95)
    assert (difference.low, difference.high) == pytest.approx((t.low, t.high), abs=0.02)
    assert difference.mean_difference == pytest.approx(np.mean(b - a))
    assert (difference.mean_a, difference.mean_b, difference.n) == (
        pytest.approx(a.mean()),
        pytest.approx(b.mean()),
        200,
    )


def test_the_interval_covers_the_true_mean_at_its_confidence_level() -> None:
    rng = np.random.default_rng(3)
    inside = 0
    for _ in range(150):
        low, high = bca_interval(rng.exponential(size=50)) or (math.nan, math.nan)
        inside += low <= 1 <= high
    assert 0.87 <= inside / 150 <= 0.99  # below 95 % for so skewed a distribution; 2.7 standard errors


def test_paired_differences_show_what_means_cannot() -> None:
    """Photographs differ by 5 dB, the methods on one photograph by 0.2 dB."""
    rng = np.random.default_rng(4)
    a = rng.normal(20, 5, 40)
    b = a + 0.2 + rng.normal(0, 0.2, 40)
    difference = paired_difference(a.tolist(), b.tolist(), "psnr_rgb_hole", "center")
    assert difference is not None
    assert difference.verdict == "better"
    assert stats.ttest_ind(a, b).pvalue > 0.5
    reverse = paired_difference(b.tolist(), a.tolist(), "psnr_rgb_hole", "center")
    assert reverse is not None
    assert (reverse.verdict, reverse.improvement) == ("worse", pytest.approx(-difference.improvement))
    errors = paired_difference(a.tolist(), b.tolist(), "l1_percent", "center")
    assert errors is not None
    assert (errors.verdict, errors.improvement < 0) == ("worse", True), "more of an error is worse"
    noise = paired_difference(a.tolist(), rng.normal(20, 5, 40).tolist(), "psnr_rgb_hole", "center")
    assert noise is not None
    assert noise.verdict == "no difference shown"


def test_few_equal_exact_and_missing_scores() -> None:
    few = paired_difference([1.0] * (MIN_PAIRS - 1), [2.0] * (MIN_PAIRS - 1), "psnr_rgb", "center")
    assert few is not None
    assert (few.low, few.high, few.verdict) == (None, None, "too few (under 10)")
    assert "too few for an interval, n = 9" in str(few)
    same = paired_difference([1.0] * MIN_PAIRS, [1.0] * MIN_PAIRS, "psnr_rgb", "center")
    assert same is not None
    assert (same.low, same.high, same.verdict) == (0, 0, "the same")
    exact = paired_difference(
        [*[1.0] * 10, math.inf, 3.0, None], [*[2.0] * 10, 1.0, math.inf, 1.0], "psnr_rgb", "center"
    )
    assert exact is not None
    assert (exact.n, exact.excluded, exact.mean_difference) == (10, 2, 1.0)
    assert paired_difference([None, math.inf], [1.0, 1.0], "psnr_rgb", "center") is None


def test_differences_per_band_are_those_of_the_evaluations_means() -> None:
    rng = np.random.default_rng(0)
    photos = [
        (
            str(i),
            cv2.resize(rng.integers(0, 256, (4, 4, 3), np.uint8), (32, 32), interpolation=cv2.INTER_CUBIC),
        )
        for i in range(24)
    ]
    methods = {
        name: method for name, method in baseline_methods().items() if name in ("telea", "mean_colour")
    }
    evaluation = evaluate(
        methods, photos, EvaluationConfig(masks=("brush", "center"), distance=None, grid_rows=1)
    )
    rows = compare_methods(evaluation, "mean_colour", "telea")
    assert len({row.band for row in rows if row.masks == "brush"}) > 2
    assert {row.band for row in rows if row.masks == "center"} == {"all"}
    for row in rows:
        a, b = (evaluation.row(method, row.masks, row.band) for method in ("mean_colour", "telea"))
        if row.metric in a.metrics and not row.excluded:  # scores of all photographs, all finite
            assert row.n == a.n
            assert (row.mean_a, row.mean_b) == pytest.approx((a.metrics[row.metric], b.metrics[row.metric]))
            assert row.mean_difference == pytest.approx(row.mean_b - row.mean_a)
    text = format_comparison(evaluation, rows, "mean_colour", "telea")
    assert max(map(len, text.splitlines())) <= 100
    for words in (
        "A: mean_colour",
        "BCa",
        "brush masks, 24 photographs",
        "center masks",
        "PSNR hole",
        "too few",
    ):
        assert words in text
    assert "TV" not in text


def test_a_failed_method_is_named() -> None:
    def fails(image: np.ndarray, mask: np.ndarray, edge: np.ndarray | None) -> np.ndarray:
        raise ValueError("no hole of this form")

    photos = [(str(i), np.full((32, 32, 3), i, np.uint8)) for i in range(3)]
    config = EvaluationConfig(distance=None, grid_rows=1)
    evaluation = evaluate({**baseline_methods(), "mine": fails}, photos, config)
    with pytest.raises(ValueError, match="mine cannot complete 3 of 3 photographs: no hole of this form"):
        compare_methods(evaluation, "telea", "mine")


def test_two_models_side_by_side(chain: PipelineOutputs, tmp_path: Path) -> None:
    out = tmp_path / "pictures" / "compared.png"
    shards = chain.storage.subfolder("work/s/a1").uri
    uri, masks = chain.tracking.uri, ["center", "box"]
    comparison = compare_models(
        *("encoder/1", "encoder"),
        images=shards,
        masks=masks,
        grid_rows=2,
        out=out,
        tracking_uri=uri,
    )
    assert (comparison.a, comparison.b, comparison.size) == ("encoder/1", "encoder/2", 32)
    rows = {(row.masks, row.band, row.metric): row for row in comparison.differences}
    assert rows["center", "all", "psnr_rgb_hole"].verdict == "better"
    assert rows["center", "all", "l1_percent"].verdict == "better"
    assert f"side by side: {out}" in comparison.text
    with Image.open(out) as picture:  # 4 columns and 4 rows of 128 pixels
        assert (picture.width // 128, picture.height // 128) == (4, 4)
    with pytest.raises(ValueError, match=r"are the same, encoder/2: there is nothing to compare"):
        compare_models("encoder", "models:/encoder/2", images=shards, masks=masks, tracking_uri=uri)
