"""Bootstrap intervals of many means at once: against SciPy's, for few values, and their time."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from scipy import stats

from pipelines.evaluation.comparison import bca_interval
from pipelines.evaluation.intervals import BOOTSTRAP_RESAMPLES, MIN_PAIRS, bca_intervals


@pytest.mark.parametrize("n", [12, 84])
def test_intervals_are_those_of_scipy_with_the_same_draws(n: int) -> None:
    rng = np.random.default_rng(1)
    values = np.stack(
        [rng.lognormal(size=n), rng.normal(20, 3, n), rng.exponential(size=n), rng.uniform(size=n)]
    )
    ends = bca_intervals(values)
    for row, interval in zip(values, ends, strict=True):
        expected = stats.bootstrap(
            (row,), np.mean, n_resamples=BOOTSTRAP_RESAMPLES, method="BCa", rng=np.random.default_rng(0)
        ).confidence_interval
        assert interval == pytest.approx(
            expected, rel=2e-3 if n < 20 else 1e-9
        )  # few values: ties of the draws


def test_a_row_has_the_same_interval_alone_and_among_others() -> None:
    values = np.random.default_rng(2).normal(size=(40, 84))
    together = bca_intervals(values)
    assert np.array_equal(together, bca_intervals(values)), "a pure function"
    for row, interval in zip(values[:3], together, strict=False):
        assert bca_interval(row) == pytest.approx(tuple(interval), rel=1e-12)
    assert not np.array_equal(together, bca_intervals(values, seed=1))


def test_chunks_of_draws_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipelines.evaluation import intervals

    values = np.random.default_rng(3).normal(size=(2, 31))
    expected = bca_intervals(values, seed=7)
    intervals._resample_counts.cache_clear()
    monkeypatch.setattr(intervals, "_CHUNK_DRAWS", 1000)
    np.testing.assert_allclose(bca_intervals(values, seed=7), expected, rtol=1e-12)
    intervals._resample_counts.cache_clear()


@pytest.mark.parametrize("n", [1, 2, MIN_PAIRS - 1])
def test_few_values_have_no_interval(n: int) -> None:
    assert np.isnan(bca_intervals(np.ones((3, n)))).all()
    assert bca_interval(np.arange(float(n))) is None


def test_ten_values_have_one() -> None:
    low, high = bca_interval(np.arange(10.0)) or (math.nan, math.nan)
    assert 2.5 < low < 4.5 < high < 6.5


def test_equal_values_have_an_interval_of_width_zero() -> None:
    assert bca_intervals(np.full((1, 12), 0.1)).tolist() == [[0.1, 0.1]]


def test_resamples_that_tie_with_the_mean_count_half() -> None:
    """One photograph differs: its count is 1, a tie with the mean, in 37 % of the resamples; the ends are quantiles of
    Poisson(1) counts."""
    values = np.zeros((1, 100))
    values[0, 3] = 0.3
    low, high = bca_intervals(values)[0]
    assert low == pytest.approx(0, abs=0.003)
    assert high in (pytest.approx(0.3 * k / 100) for k in (3, 4, 5, 6, 7))


def test_no_rows_are_no_intervals() -> None:
    assert bca_intervals(np.zeros((0, 84))).shape == (0, 2)


def test_a_table_of_84_photographs_takes_well_under_a_second() -> None:
    """12 methods x 8 metrics, means and differences: 0.1 s on an idle core."""
    values = np.random.default_rng(4).normal(size=(2 * 12 * 8, 84))
    bca_intervals(values[:1])
    started = time.process_time()
    bca_intervals(values)
    assert time.process_time() - started < 1
