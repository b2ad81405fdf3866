"""Paired differences and their intervals, against the t interval and Efron's formulas; the comparison of two models."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import NormalDist

import cv2
import numpy as np
import pytest
from PIL import Image
from scipy import stats
from stores import Chain

from pipelines.evaluation.comparing import ENOUGH, differences, interval, paired
from pipelines.evaluation.evaluate import EvaluationSpec, baselines, evaluate
from pipelines.evaluation.side_by_side import compare_models, comparison_text


def efron(values: np.ndarray, level: float, resamples: int, seed: int) -> tuple[float, float]:
    """BCa as Efron (1987) and Efron and Tibshirani (1993, chapter 14) have it, with draws of its own."""
    rng, n, normal = np.random.default_rng(seed), len(values), NormalDist()
    draws = np.sort(values[rng.integers(0, n, (resamples, n))].mean(1))
    bias = normal.inv_cdf(float((draws < values.mean()).mean()))
    left_out = (values.sum() - values) / (n - 1)
    apart = left_out.mean() - left_out
    acceleration = (apart**3).sum() / (6 * (apart**2).sum() ** 1.5)
    ends = []
    for share in ((1 - level) / 2, (1 + level) / 2):
        z = bias + normal.inv_cdf(share)
        ends.append(float(np.quantile(draws, normal.cdf(bias + z / (1 - acceleration * z)))))
    return ends[0], ends[1]


def test_the_interval_is_efrons() -> None:
    values = np.random.default_rng(1).lognormal(
        size=60
    )  # skewed, so that BCa and the plain percentiles differ
    low, high = efron(values, 0.95, 40_000, 5)
    found = interval(values)
    assert found is not None
    width = high - low
    assert found == pytest.approx((low, high), abs=0.03 * width)
    centre = values.mean()
    assert high - centre > 1.2 * (centre - low), "it is skewed"


def test_the_interval_of_normal_differences_is_the_t_interval() -> None:
    rng = np.random.default_rng(2)
    a = rng.normal(20, 5, 200)
    b = a + rng.normal(0.3, 1, 200)
    found = paired(a.tolist(), b.tolist(), "psnr_rgb_hole", "center")
    assert found is not None
    t = stats.ttest_rel(b, a).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((t.low, t.high), abs=0.02)
    assert found.difference == pytest.approx(np.mean(b - a))
    assert (found.a, found.b, found.n) == (pytest.approx(a.mean()), pytest.approx(b.mean()), 200)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(3)
    inside = 0
    for _ in range(150):
        low, high = interval(rng.exponential(size=50)) or (math.nan, math.nan)
        inside += low <= 1 <= high
    assert 0.87 <= inside / 150 <= 0.99  # 95 % less what so skewed a mean of 50 costs; 2.7 standard errors


def test_pairs_show_what_means_cannot() -> None:
    """Photographs differ by 5 dB, methods on one photograph by 0.2."""
    rng = np.random.default_rng(4)
    a = rng.normal(20, 5, 40)
    b = a + 0.2 + rng.normal(0, 0.2, 40)
    found = paired(a.tolist(), b.tolist(), "psnr_rgb_hole", "center")
    assert found is not None
    assert found.verdict == "better"
    assert stats.ttest_ind(a, b).pvalue > 0.5
    back = paired(b.tolist(), a.tolist(), "psnr_rgb_hole", "center")
    assert back is not None
    assert (back.verdict, back.gain) == ("worse", pytest.approx(-found.gain))
    errors = paired(a.tolist(), b.tolist(), "l1_percent", "center")
    assert errors is not None
    assert (errors.verdict, errors.gain < 0) == ("worse", True), "more of an error is worse"
    noise = paired(a.tolist(), rng.normal(20, 5, 40).tolist(), "psnr_rgb_hole", "center")
    assert noise is not None
    assert noise.verdict == "no difference shown"


def test_what_cannot_be_paired() -> None:
    few = paired([1.0] * (ENOUGH - 1), [2.0] * (ENOUGH - 1), "psnr_rgb", "center")
    assert few is not None
    assert (few.low, few.high, few.verdict) == (None, None, "too few (under 10)")
    assert "too few for an interval, n = 9" in str(few)
    same = paired([1.0] * ENOUGH, [1.0] * ENOUGH, "psnr_rgb", "center")
    assert same is not None
    assert (same.low, same.high, same.verdict) == (0, 0, "the same")
    exact = paired(
        [*[1.0] * 10, math.inf, 3.0, None], [*[2.0] * 10, 1.0, math.inf, 1.0], "psnr_rgb", "center"
    )
    assert exact is not None
    assert (exact.n, exact.left_out, exact.difference) == (10, 2, 1.0)
    assert paired([None, math.inf], [1.0, 1.0], "psnr_rgb", "center") is None


def test_a_table_by_band() -> None:
    """Against the evaluation's own means: per band, over the same photographs."""
    rng = np.random.default_rng(0)
    photos = [
        (
            str(i),
            cv2.resize(rng.integers(0, 256, (4, 4, 3), np.uint8), (32, 32), interpolation=cv2.INTER_CUBIC),
        )
        for i in range(24)
    ]
    methods = {name: method for name, method in baselines().items() if name in ("telea", "mean_colour")}
    found = evaluate(methods, photos, EvaluationSpec(("brush", "center"), distance=None, samples=1))
    rows = differences(found, "mean_colour", "telea")
    assert len({row.band for row in rows if row.masks == "brush"}) > 2
    assert {row.band for row in rows if row.masks == "center"} == {"all"}
    for row in rows:
        a, b = (found.row(method, row.masks, row.band) for method in ("mean_colour", "telea"))
        if row.metric in a.metrics and not row.left_out:  # of every photograph, and finite
            assert row.n == a.n
            assert (row.a, row.b) == pytest.approx((a.metrics[row.metric], b.metrics[row.metric]))
            assert row.difference == pytest.approx(row.b - row.a)
    text = comparison_text(found, rows, "mean_colour", "telea")
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


def test_a_method_that_fails_is_named() -> None:
    def fails(image: np.ndarray, mask: np.ndarray, edge: np.ndarray | None) -> np.ndarray:
        raise ValueError("no hole of this form")

    photos = [(str(i), np.full((32, 32, 3), i, np.uint8)) for i in range(3)]
    spec = EvaluationSpec(distance=None, samples=1)
    found = evaluate({**baselines(), "mine": fails}, photos, spec)
    with pytest.raises(ValueError, match="mine cannot complete 3 of 3 photographs: no hole of this form"):
        differences(found, "telea", "mine")


def test_two_models_side_by_side(chain: Chain, tmp_path: Path) -> None:
    out = tmp_path / "pictures" / "compared.png"
    shards = chain.storage.sub("work/s/a1").uri
    uri, masks = chain.place.uri, ["center", "box"]
    found = compare_models(
        *("encoder/1", "encoder"),
        images=shards,
        masks=masks,
        samples=2,
        out=out,
        tracking_uri=uri,
        quiet=True,
    )
    assert (found["a"], found["b"], found["size"]) == ("encoder/1", "encoder/2", 32)
    rows = {(row["masks"], row["band"], row["metric"]): row for row in found["differences"]}
    assert rows["center", "all", "psnr_rgb_hole"]["verdict"] == "better"
    assert rows["center", "all", "l1_percent"]["verdict"] == "better"
    assert f"side by side: {out}" in found["text"]
    with Image.open(out) as picture:  # 4 columns and 4 rows of 128 pixels
        assert (picture.width // 128, picture.height // 128) == (4, 4)
    with pytest.raises(ValueError, match=r"are the same, encoder/2: there is nothing to compare"):
        compare_models("encoder", "models:/encoder/2", images=shards, masks=masks, tracking_uri=uri)
