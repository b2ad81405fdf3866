"""Statistics of a sweep on synthetic trials with known means, deviations, trends and importances."""

from __future__ import annotations

import math
from itertools import product
from statistics import fmean

import numpy as np
import pytest
from scipy import stats

from pipelines.sweeps.report.statistics import (
    field_axis,
    field_importance,
    format_value,
    mean_per_value,
    pooled_seed_std,
    response_points,
    spearman_trend,
    t_test_p_value,
    two_metric_front,
    varying_axes,
)
from pipelines.sweeps.results import FAILED, FINISHED, SweepResult, TrialRecord

PSNR, FD = "psnr_rgb_hole", "fd"


def sweep(fields, rows) -> SweepResult:
    """rows: (values, (PSNR, FD), or None for a failed trial)."""
    trials = [
        TrialRecord(
            number,
            dict(values),
            FAILED if scores is None else FINISHED,
            scores=dict(zip((PSNR, FD), scores or ())),
        )
        for number, (values, scores) in enumerate(rows)
    ]
    return SweepResult("made-up", "a_model", fields, (PSNR, FD), tuple(trials))


def over_sigma(scores: dict[float, list[float]]) -> SweepResult:
    """sigma -> PSNR per seed; FD = 40 - PSNR."""
    rows = [
        ({"edges.sigma": s, "seed": i}, (p, 40 - p)) for s, ps in scores.items() for i, p in enumerate(ps)
    ]
    return sweep({"edges.sigma": {"grid": list(scores)}, "seed": {"grid": [0, 1, 2]}}, rows)


def test_response_points_have_mean_and_sample_deviation_per_setting_in_axis_order():
    scores = {3: [21.0, 21.4, 22.0], 0.5: [20.0, 20.5, 20.1], 1: [23.0, math.nan, 23.2]}
    result = over_sigma(scores)
    rows = response_points(result, "edges.sigma", PSNR)
    assert [row.value for row in rows] == [0.5, 3]  # in the axis' order; without the one that lacks a score
    for row in rows:
        assert row.mean == pytest.approx(np.mean(scores[row.value]))
        assert row.std == pytest.approx(np.std(scores[row.value], ddof=1))
        assert row.scores == tuple(scores[row.value])


def test_mean_per_value_averages_over_the_other_field():
    rows = [({"a": a, "b": b}, (10 * a + b, 1.0)) for a, b in product((1, 2), (0, 4, 5))]
    result = sweep({"a": {"grid": [1, 2]}, "b": {"grid": [0, 4, 5]}}, rows)
    assert mean_per_value(response_points(result, "a", PSNR)) == [(1, 13.0), (2, 23.0)]
    assert len(response_points(result, "b", PSNR)) == 6


def axis(values, spec):
    return field_axis(sweep({"x": spec}, [({"x": value}, (1.0, 1.0)) for value in values]), "x")


def test_decades_are_equally_long_and_zero_is_separate_at_the_left():
    field = axis([1, 0.01, 0, 0.1], {"grid": [1, 0.01, 0, 0.1]})
    assert field.kind == "log"
    zero, *positions = [field.position(value) for value in (0, 0.01, 0.1, 1)]
    assert np.diff(positions) == pytest.approx([1, 1])
    assert zero < field.break_position < positions[0]
    assert [label for _, label in field.ticks] == ["0", "0.01", "0.1", "1"]
    assert axis([0.01, 1], {"grid": [0.01, 1]}).break_position is None


@pytest.mark.parametrize(
    ("values", "spec", "kind"),
    [
        ([0.5, 1, 2, 5], {"grid": [0.5, 1, 2, 5]}, "linear"),
        ([0.001, 0.9], {"uniform": [0, 1]}, "linear"),  # uniform, whatever the samples are
        ([0.02, 0.03], {"loguniform": [0.01, 0.1]}, "log"),
        ([-1, 0.001, 100], {"choice": [-1, 0.001, 100]}, "linear"),
        ([True, False], {"choice": [True, False]}, "categorical"),
        (["adam", "sgd"], {"grid": ["sgd", "adam"]}, "categorical"),
        ([1, (1, 2)], {"grid": [1, [1, 2]]}, "categorical"),
        ([1, 100], {"grid": [1, 100], "uniform": None}, "log"),
    ],
)
def test_the_kind_of_a_fields_axis(values, spec, kind):
    assert axis(values, spec).kind == kind


def test_categories_keep_the_recipes_order():
    assert axis(["adam", "sgd", "lion"], {"choice": ["sgd", "lion", "adam"]}).values == (
        "sgd",
        "lion",
        "adam",
    )


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (1e-5, 1.0), (0.02, 0.09), (3, 1000), (999.5, 1000.5)])
@pytest.mark.parametrize("kind", ["uniform", "loguniform"])
def test_ranges_have_a_few_ticks_inside(low, high, kind):
    if kind == "loguniform" and low == 0:
        low = 0.5
    field = axis(np.linspace(low, high, 30).tolist(), {kind: [low, high]})
    positions = [position for position, _ in field.ticks]
    assert 1 <= len(positions) <= 10
    assert field.ends[0] - 1e-6 <= min(positions) <= max(positions) <= field.ends[1] + 1e-6
    assert positions == sorted(positions)


def test_constant_fields_and_the_seed_have_no_axis():
    rows = [({"a": a, "b": 3, "seed": s}, (1.0, 1.0)) for a in (1, 2) for s in (0, 1)]
    assert [axis.path for axis in varying_axes(sweep({"a": {}, "b": {}, "seed": {}}, rows))] == ["a"]


def test_lists_from_json_can_be_grouped():
    result = sweep(
        {"edges.sigma": {"grid": [1, [1, 2]]}}, [({"edges.sigma": v}, (20.0, 1.0)) for v in (1, [1, 2])]
    )
    groups = SweepResult.from_json(result.to_json()).groups
    assert [format_value(group.values["edges.sigma"]) for group in groups] == ["1", "[1, 2]"]


def test_the_seed_deviation_is_pooled_over_settings_with_different_numbers_of_seeds():
    result = over_sigma({1: [20.0, 21.0, 22.0], 2: [30.0, 30.4], 3: [5.0]})
    squares = 2.0 + 2 * 0.2**2  # sums of squares about the settings' means
    assert pooled_seed_std(result, PSNR) == (pytest.approx(math.sqrt(squares / 3)), 3)
    assert math.isnan(pooled_seed_std(over_sigma({1: [20.0], 2: [21.0]}), PSNR)[0])


def test_the_p_value_of_two_settings_is_students_t_test():
    a, b = [20.0, 20.4, 20.1], [20.6, 20.9]
    result = over_sigma({1: a, 2: b})
    expected = stats.ttest_ind(a, b, equal_var=True).pvalue
    assert t_test_p_value(result, *result.groups, PSNR) == pytest.approx(expected)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_monotone_trend_has_rho_1_and_the_permutations_p_value(sign):
    result = over_sigma({s: [20 + sign * s**3] for s in (0.5, 1, 1.5, 2, 3, 4)})
    rho, p, n = spearman_trend(result, varying_axes(result)[0], PSNR)
    assert rho == pytest.approx(sign)
    assert p == pytest.approx(2 / math.factorial(6))  # the two monotone orders among all
    assert n == 6


def test_spearmans_rho_with_ties_is_scipys():
    rows = [({"a": a, "b": b}, (math.sin(3 * a + b), 1.0)) for a, b in product(range(4), range(3))]
    result = sweep({"a": {"grid": [0, 1, 2, 3]}, "b": {"grid": [0, 1, 2]}}, rows)
    trend = spearman_trend(result, varying_axes(result)[0], PSNR)
    expected = stats.spearmanr([values["a"] for values, _ in rows], [scores[0] for _, scores in rows])
    assert trend[0] == pytest.approx(expected.statistic)
    assert trend[1] == pytest.approx(expected.pvalue, abs=0.05)


def test_no_trend_for_four_settings_equal_scores_or_categories():
    four, flat = (over_sigma({s: [y * s] for s in v}) for v, y in (((1, 2, 3, 4), 1), ((1, 2, 3, 4, 5), 0)))
    words = sweep(
        {"x": {"grid": list("abcdef")}}, [({"x": x}, (float(i), 1.0)) for i, x in enumerate("abcdef")]
    )
    for result in (four, flat, words):
        assert spearman_trend(result, varying_axes(result)[0], PSNR) is None


def test_importance_of_the_only_relevant_field():
    grid = [1e-4, 1e-3, 1e-2, 1e-1]
    rng = np.random.default_rng(0)
    rows = [
        ({"a": a, "b": b, "c": c}, (-((math.log10(a) + 3) ** 2) + 0.01 * rng.normal(), 1.0))
        for a, b, c in product(grid, (1, 50, 250), ("x", "y"))
    ]
    shares = field_importance(
        sweep({"a": {"grid": grid}, "b": {"grid": [1, 50, 250]}, "c": {"choice": ["x", "y"]}}, rows), PSNR
    )
    assert shares["a"] > 0.95
    assert shares["b"] + shares["c"] < 0.05


def test_importance_weighs_all_decades_equally():
    """Only the lowest of four decades differs: a forest on the raw numbers would hardly detect it."""
    rng = np.random.default_rng(1)
    drawn = [(10 ** rng.uniform(-4, 0), rng.uniform(0, 1)) for _ in range(60)]
    rows = [({"a": a, "b": b}, (float(a < 1e-3) + 0.5 * (b > 0.9), 1.0)) for a, b in drawn]
    shares = field_importance(sweep({"a": {"loguniform": [1e-4, 1]}, "b": {"uniform": [0, 1]}}, rows), PSNR)
    assert shares["a"] > 0.7
    assert 0 < shares["b"] < 0.3


@pytest.mark.slow
def test_importance_is_proportional_to_the_variances():
    rows = [({"a": a, "b": b}, (3.0 * a + b, 1.0)) for a, b in product(range(5), range(5))]
    result = sweep({"a": {"grid": list(range(5))}, "b": {"grid": list(range(5))}}, rows)
    shares = field_importance(result, PSNR)
    assert shares["a"] == pytest.approx(0.9, abs=0.05)  # 9 : 1
    assert shares["b"] == pytest.approx(0.1, abs=0.05)


def test_importance_reports_why_it_is_unknown():
    fields = {"a": {"grid": [0, 1]}, "b": {"grid": [0, 1]}, "seed": {"grid": [0, 1]}}
    cells = list(product((0, 1), (0, 1)))
    few = sweep(fields, [({"a": a, "b": b}, (float(a), 1.0)) for a, b in cells[:3]])
    assert "3 settings with a score are too few for 2 fields: 4 are needed" in field_importance(few, PSNR)
    flat = sweep(fields, [({"a": a, "b": b}, (20.0, 1.0)) for a, b in cells])
    assert field_importance(flat, PSNR) == "all settings score the same"
    noisy = [({"a": a, "b": b, "seed": s}, (20 + 0.1 * a + 5 * s, 1.0)) for a, b in cells for s in (0, 1)]
    assert "no more than seeds" in field_importance(sweep(fields, noisy), PSNR)


def test_the_two_metric_front_uses_the_first_two_metrics():
    rows = [({"a": a}, (psnr, fd)) for a, psnr, fd in ((1, 20, 9), (2, 22, 12), (3, 21, 13), (4, 21.5, 10))]
    result = sweep({"a": {"grid": [1, 2, 3, 4]}}, rows)
    assert [group.values["a"] for group in two_metric_front(result)] == [2, 4, 1]
    assert fmean(group.mean(PSNR) for group in two_metric_front(result)) == pytest.approx(63.5 / 3)
