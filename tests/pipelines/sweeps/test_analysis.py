"""A sweep's numbers: on made-up trials whose means, spreads, trends and causes are known."""

from __future__ import annotations

import math
from itertools import product
from statistics import fmean

import numpy as np
import pytest
from scipy import stats

from pipelines.sweeps.analysis import (
    axis_of,
    chance,
    front,
    importance,
    noise,
    profile,
    response,
    shown,
    trend,
    varied,
)
from pipelines.sweeps.result import FAILED, FINISHED, SweepResult, Trial

PSNR, FD = "psnr_rgb_hole", "fd"


def sweep(fields, rows) -> SweepResult:
    """rows: (values, scores of PSNR and FD, or None for a failed trial)."""
    trials = [
        Trial(
            number,
            dict(values),
            FAILED if scores is None else FINISHED,
            scores=dict(zip((PSNR, FD), scores or ())),
        )
        for number, (values, scores) in enumerate(rows)
    ]
    return SweepResult("made-up", "a_model", fields, (PSNR, FD), tuple(trials))


def over_sigma(scores: dict[float, list[float]]) -> SweepResult:
    """sigma -> PSNR of each seed; FD is 40 less PSNR."""
    rows = [
        ({"edges.sigma": s, "seed": i}, (p, 40 - p)) for s, ps in scores.items() for i, p in enumerate(ps)
    ]
    return sweep({"edges.sigma": {"grid": list(scores)}, "seed": {"grid": [0, 1, 2]}}, rows)


def test_a_response_has_mean_and_sample_deviation_of_every_setting_along_its_axis():
    scores = {3: [21.0, 21.4, 22.0], 0.5: [20.0, 20.5, 20.1], 1: [23.0, math.nan, 23.2]}
    result = over_sigma(scores)
    rows = response(result, "edges.sigma", PSNR)
    assert [row.value for row in rows] == [0.5, 3]  # in the axis' order; without the one that lacks a score
    for row in rows:
        assert row.mean == pytest.approx(np.mean(scores[row.value]))
        assert row.spread == pytest.approx(np.std(scores[row.value], ddof=1))
        assert row.scores == tuple(scores[row.value])


def test_with_two_fields_the_profile_is_the_mean_over_the_settings_at_each_value():
    rows = [({"a": a, "b": b}, (10 * a + b, 1.0)) for a, b in product((1, 2), (0, 4, 5))]
    result = sweep({"a": {"grid": [1, 2]}, "b": {"grid": [0, 4, 5]}}, rows)
    assert profile(response(result, "a", PSNR)) == [(1, 13.0), (2, 23.0)]
    assert len(response(result, "b", PSNR)) == 6


def axis(values, spec):
    return axis_of(sweep({"x": spec}, [({"x": value}, (1.0, 1.0)) for value in values]), "x")


def test_decades_are_equally_long_and_zero_stands_apart_at_the_left():
    found = axis([1, 0.01, 0, 0.1], {"grid": [1, 0.01, 0, 0.1]})
    assert found.kind == "log"
    zero, *places = [found.position(value) for value in (0, 0.01, 0.1, 1)]
    assert np.diff(places) == pytest.approx([1, 1])
    assert zero < found.broken < places[0]
    assert [label for _, label in found.ticks] == ["0", "0.01", "0.1", "1"]
    assert axis([0.01, 1], {"grid": [0.01, 1]}).broken is None


@pytest.mark.parametrize(
    ("values", "spec", "kind"),
    [
        ([0.5, 1, 2, 5], {"grid": [0.5, 1, 2, 5]}, "linear"),
        ([0.001, 0.9], {"uniform": [0, 1]}, "linear"),  # drawn evenly, whatever came out
        ([0.02, 0.03], {"loguniform": [0.01, 0.1]}, "log"),
        ([-1, 0.001, 100], {"choice": [-1, 0.001, 100]}, "linear"),
        ([True, False], {"choice": [True, False]}, "places"),
        (["adam", "sgd"], {"grid": ["sgd", "adam"]}, "places"),
        ([1, (1, 2)], {"grid": [1, [1, 2]]}, "places"),
        ([1, 100], {"grid": [1, 100], "uniform": None}, "log"),
    ],
)
def test_what_kind_of_axis_a_field_has(values, spec, kind):
    assert axis(values, spec).kind == kind


def test_words_stand_in_the_recipes_order():
    assert axis(["adam", "sgd", "lion"], {"choice": ["sgd", "lion", "adam"]}).values == (
        "sgd",
        "lion",
        "adam",
    )


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (1e-5, 1.0), (0.02, 0.09), (3, 1000), (999.5, 1000.5)])
@pytest.mark.parametrize("kind", ["uniform", "loguniform"])
def test_ranges_have_a_few_ticks_within_them(low, high, kind):
    if kind == "loguniform" and low == 0:
        low = 0.5
    found = axis(np.linspace(low, high, 30).tolist(), {kind: [low, high]})
    places = [place for place, _ in found.ticks]
    assert 1 <= len(places) <= 10
    assert found.ends[0] - 1e-6 <= min(places) <= max(places) <= found.ends[1] + 1e-6
    assert places == sorted(places)


def test_fields_that_do_not_vary_and_the_seed_are_no_axes():
    rows = [({"a": a, "b": 3, "seed": s}, (1.0, 1.0)) for a in (1, 2) for s in (0, 1)]
    assert [axis.path for axis in varied(sweep({"a": {}, "b": {}, "seed": {}}, rows))] == ["a"]


def test_lists_from_json_can_be_grouped():
    result = sweep(
        {"edges.sigma": {"grid": [1, [1, 2]]}}, [({"edges.sigma": v}, (20.0, 1.0)) for v in (1, [1, 2])]
    )
    groups = SweepResult.from_json(result.to_json()).groups
    assert [shown(group.values["edges.sigma"]) for group in groups] == ["1", "[1, 2]"]


def test_noise_is_pooled_over_settings_of_different_size():
    result = over_sigma({1: [20.0, 21.0, 22.0], 2: [30.0, 30.4], 3: [5.0]})
    squares = 2.0 + 2 * 0.2**2  # sums of squares about the settings' means
    assert noise(result, PSNR) == (pytest.approx(math.sqrt(squares / 3)), 3)
    assert math.isnan(noise(over_sigma({1: [20.0], 2: [21.0]}), PSNR)[0])


def test_chance_is_students_t_test_for_two_settings():
    a, b = [20.0, 20.4, 20.1], [20.6, 20.9]
    result = over_sigma({1: a, 2: b})
    expected = stats.ttest_ind(a, b, equal_var=True).pvalue
    assert chance(result, *result.groups, PSNR) == pytest.approx(expected)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_steady_trend_is_found_and_its_chance_is_that_of_the_order(sign):
    result = over_sigma({s: [20 + sign * s**3] for s in (0.5, 1, 1.5, 2, 3, 4)})
    rho, p, n = trend(result, varied(result)[0], PSNR)
    assert rho == pytest.approx(sign)
    assert p == pytest.approx(2 / math.factorial(6))  # the two monotone orders among all
    assert n == 6


def test_spearmans_rho_with_ties_is_scipys():
    rows = [({"a": a, "b": b}, (math.sin(3 * a + b), 1.0)) for a, b in product(range(4), range(3))]
    result = sweep({"a": {"grid": [0, 1, 2, 3]}, "b": {"grid": [0, 1, 2]}}, rows)
    found = trend(result, varied(result)[0], PSNR)
    expected = stats.spearmanr([values["a"] for values, _ in rows], [scores[0] for _, scores in rows])
    assert found[0] == pytest.approx(expected.statistic)
    assert found[1] == pytest.approx(expected.pvalue, abs=0.05)


def test_no_trend_is_claimed_of_four_settings_equal_scores_or_words():
    four, flat = (over_sigma({s: [y * s] for s in v}) for v, y in (((1, 2, 3, 4), 1), ((1, 2, 3, 4, 5), 0)))
    words = sweep(
        {"x": {"grid": list("abcdef")}}, [({"x": x}, (float(i), 1.0)) for i, x in enumerate("abcdef")]
    )
    for result in (four, flat, words):
        assert trend(result, varied(result)[0], PSNR) is None


def test_importance_recovers_the_only_field_that_matters():
    grid = [1e-4, 1e-3, 1e-2, 1e-1]
    rng = np.random.default_rng(0)
    rows = [
        ({"a": a, "b": b, "c": c}, (-((math.log10(a) + 3) ** 2) + 0.01 * rng.normal(), 1.0))
        for a, b, c in product(grid, (1, 50, 250), ("x", "y"))
    ]
    shares = importance(
        sweep({"a": {"grid": grid}, "b": {"grid": [1, 50, 250]}, "c": {"choice": ["x", "y"]}}, rows), PSNR
    )
    assert shares["a"] > 0.95
    assert shares["b"] + shares["c"] < 0.05


def test_importance_counts_decades_alike():
    """Only the lowest of four decades differs: a forest on the numbers themselves would hardly see it."""
    rng = np.random.default_rng(1)
    drawn = [(10 ** rng.uniform(-4, 0), rng.uniform(0, 1)) for _ in range(60)]
    rows = [({"a": a, "b": b}, (float(a < 1e-3) + 0.5 * (b > 0.9), 1.0)) for a, b in drawn]
    shares = importance(sweep({"a": {"loguniform": [1e-4, 1]}, "b": {"uniform": [0, 1]}}, rows), PSNR)
    assert shares["a"] > 0.7
    assert 0 < shares["b"] < 0.3


def test_importance_splits_as_the_variances_do():
    rows = [({"a": a, "b": b}, (3.0 * a + b, 1.0)) for a, b in product(range(5), range(5))]
    result = sweep({"a": {"grid": list(range(5))}, "b": {"grid": list(range(5))}}, rows)
    shares = importance(result, PSNR)
    assert shares["a"] == pytest.approx(0.9, abs=0.05)  # 9 : 1
    assert shares["b"] == pytest.approx(0.1, abs=0.05)


def test_importance_says_why_it_cannot_be_had():
    fields = {"a": {"grid": [0, 1]}, "b": {"grid": [0, 1]}, "seed": {"grid": [0, 1]}}
    cells = list(product((0, 1), (0, 1)))
    few = sweep(fields, [({"a": a, "b": b}, (float(a), 1.0)) for a, b in cells[:3]])
    assert "3 settings with a score are too few for 2 fields: 4 are needed" in importance(few, PSNR)
    flat = sweep(fields, [({"a": a, "b": b}, (20.0, 1.0)) for a, b in cells])
    assert importance(flat, PSNR) == "all settings score the same"
    noisy = [({"a": a, "b": b, "seed": s}, (20 + 0.1 * a + 5 * s, 1.0)) for a, b in cells for s in (0, 1)]
    assert "no more than seeds" in importance(sweep(fields, noisy), PSNR)


def test_the_front_is_of_the_first_two_metrics():
    rows = [({"a": a}, (psnr, fd)) for a, psnr, fd in ((1, 20, 9), (2, 22, 12), (3, 21, 13), (4, 21.5, 10))]
    result = sweep({"a": {"grid": [1, 2, 3, 4]}}, rows)
    assert [group.values["a"] for group in front(result)] == [2, 4, 1]
    assert fmean(group.mean(PSNR) for group in front(result)) == pytest.approx(63.5 / 3)
