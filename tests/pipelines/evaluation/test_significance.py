"""Intervals and marks of the tables: few photographs, exact results, failures, text, Markdown and HTML."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from pipelines.evaluation.comparison import bca_interval, paired_difference
from pipelines.evaluation.protocol import EMPTY_PROTOCOL
from pipelines.evaluation.results import EvaluationResult
from pipelines.evaluation.significance import (
    INTERVALS_NOTE,
    TOO_FEW_NOTE,
    WORSE_NOTE,
    MeanStats,
    mean_stats,
)
from pipelines.evaluation.tables import band_tables, main_tables, table_markdown, table_text
from pipelines.run_report import ReportData, report_html

METRIC = "psnr_rgb_hole"


def result(
    columns: dict[str, list[float]], metric: str = METRIC, bands: list[str] | None = None
) -> EvaluationResult:
    """An evaluation of methods with these scores."""
    n = len(next(iter(columns.values())))
    return EvaluationResult(
        methods=tuple(columns),
        photos=tuple(map(str, range(n))),
        bands={"center": bands or ["20-30"] * n},
        values={"center": {method: {metric: list(scores)} for method, scores in columns.items()}},
        failures={},
        distances={},
        truth={},
        protocol=replace(EMPTY_PROTOCOL, photographs=n),
    )


def scores(n: int, shift: float = 0.0, noise: float = 0.1) -> list[float]:
    base = np.random.default_rng(0).normal(20, 5, n)
    return (base + shift + np.random.default_rng(1).normal(0, noise, n)).tolist()


def test_the_mark_is_that_of_the_paired_difference() -> None:
    columns = {"best": scores(40, 1.0), "near": scores(40, 0.99, 0.2), "far": scores(40, 0.0, 0.2)}
    stats = mean_stats(result(columns), "center", [METRIC])
    for method in ("near", "far"):
        difference = paired_difference(columns["best"], columns[method], METRIC, "center")
        assert difference is not None
        assert stats[method, METRIC].is_worse == (difference.verdict == "worse")
    assert not stats["best", METRIC].is_worse
    assert stats["far", METRIC].is_worse
    assert not stats["near", METRIC].is_worse
    for method, column in columns.items():
        entry = stats[method, METRIC]
        assert (entry.low, entry.high) == pytest.approx(bca_interval(np.array(column)))


def test_of_errors_the_larger_one_is_worse_and_total_variation_has_no_best() -> None:
    columns = {"a": scores(20, 1.0), "b": scores(20, 0.0)}
    errors = mean_stats(result(columns, "l1_percent"), "center", ["l1_percent"])
    assert (errors["a", "l1_percent"].is_worse, errors["b", "l1_percent"].is_worse) == (True, False)
    variation = mean_stats(result(columns, "tv_percent"), "center", ["tv_percent"])
    assert not any(entry.is_worse for entry in variation.values())
    assert all(entry.low is not None for entry in variation.values())


@pytest.mark.parametrize("n", [1, 2, 9])
def test_few_photographs_have_neither_intervals_nor_marks(n: int) -> None:
    evaluation = result({"a": scores(n, 5.0), "b": scores(n)})
    assert set(mean_stats(evaluation, "center", [METRIC]).values()) == {MeanStats()}
    text = table_text(evaluation)
    assert TOO_FEW_NOTE in text
    assert "±" not in text
    assert "↓" not in text
    assert TOO_FEW_NOTE in table_markdown(evaluation)


def test_ten_photographs_have_both() -> None:
    evaluation = result({"a": scores(10, 5.0), "b": scores(10)})
    text = table_text(evaluation)
    a, b, half_widths = (
        next(line for line in text.splitlines() if line.strip().startswith(s)) for s in ("a ", "b ", "±")
    )
    assert "* " in a
    assert "↓ " in b
    low, high = bca_interval(np.array(scores(10, 5.0))) or (math.nan, math.nan)
    assert half_widths.strip() == f"±{(high - low) / 2:.2f}"
    flat = " ".join(text.split())
    assert INTERVALS_NOTE in flat
    assert WORSE_NOTE in flat
    markdown = table_markdown(evaluation)
    assert f"({low:.2f} to {high:.2f})" in next(
        line for line in markdown.splitlines() if line.startswith("| a |")
    )
    assert "**" in next(line for line in markdown.splitlines() if line.startswith("| a |"))
    assert "↓ (" in next(line for line in markdown.splitlines() if line.startswith("| b |"))
    html = report_html(ReportData("Evaluation", evaluation=evaluation))
    assert f"<small>{low:.2f} to {high:.2f}</small>" in html
    assert html.count('class="worse"') == 1
    assert WORSE_NOTE in html


def test_a_single_method_is_compared_with_nothing() -> None:
    evaluation = result({"a": scores(12)})
    assert not mean_stats(evaluation, "center", [METRIC])["a", METRIC].is_worse
    assert "±" in table_text(evaluation)


def test_exact_results_are_better_by_more_than_chance() -> None:
    evaluation = result({"exact": [math.inf] * 12, "a": scores(12)})
    stats = mean_stats(evaluation, "center", [METRIC])
    assert stats["a", METRIC].is_worse
    assert stats["exact", METRIC] == MeanStats()
    few = mean_stats(result({"exact": [math.inf] * 2, "a": scores(2)}), "center", [METRIC])
    assert not few["a", METRIC].is_worse
    some = result({"some": [math.inf, math.inf, *scores(12, 3.0)], "a": [1.0, 2.0, *scores(12)]})
    stats = mean_stats(some, "center", [METRIC])
    assert stats["a", METRIC].is_worse
    low, high = bca_interval(np.array(scores(12, 3.0))) or (math.nan, math.nan)
    assert (stats["some", METRIC].low, stats["some", METRIC].high) == pytest.approx((low, high)), (
        "of the finite ones"
    )


def test_a_method_that_failed_has_no_interval_and_changes_no_other() -> None:
    columns = {"a": scores(12), "b": scores(12, 1.0), "broken": scores(12, 9.0)}
    evaluation = replace(result(columns), failures={"center": {"broken": {3: "no file"}}})
    stats = mean_stats(evaluation, "center", [METRIC])
    assert ("broken", METRIC) not in stats
    assert stats == mean_stats(result({"a": columns["a"], "b": columns["b"]}), "center", [METRIC])


def test_bands_have_intervals_of_their_own_photographs() -> None:
    bands = ["10-20"] * 12 + ["20-30"] * 4
    columns = {"a": scores(16, 1.0), "b": scores(16)}
    (table,) = band_tables(result(columns, bands=bands))
    assert table.headings == ("all", "10-20 %", "20-30 %")
    all_masks, first, second = dict(table.lines)["a"]
    assert all_masks.text == f"{np.mean(columns['a']):.2f}"
    low, high = bca_interval(np.array(columns["a"][:12])) or (math.nan, math.nan)
    assert first.interval == f"{low:.2f} to {high:.2f}"
    assert (second.interval, second.half_width) == ("", "")
    assert [cell.worse for cell in dict(table.lines)["b"]] == [True, True, False]


@pytest.mark.parametrize(
    ("masks", "frozen", "label"),
    [
        ("mat_small", None, "small"),
        ("mat_large", None, "large"),
        ("brush", None, "all"),
        ("sets/x.tar", {"lama_thick": {"weight": 1}}, "thick"),
        ("sets/x.tar", {"mat_small": {}, "mat_large": {}}, "all"),
    ],
)
def test_the_kinds_of_benchmarks_stand_beside_the_tenths(
    masks: str, frozen: dict[str, object] | None, label: str
) -> None:
    evaluation = result({"a": scores(16)}, bands=["10-20"] * 12 + ["20-30"] * 4)
    records = {masks: {"masks": frozen}} if frozen else {}
    protocol = replace(evaluation.protocol, masks=(masks,), frozen_masks=records)
    (table,) = band_tables(replace(evaluation, protocol=protocol))
    assert table.headings[0] == label


def test_cells_that_print_the_best_value_have_no_mark() -> None:
    a = scores(40)
    evaluation = result({"a": a, "b": [value - 1e-5 for value in a], "c": [value - 1 for value in a]})
    (table,) = main_tables(evaluation)
    cells = {method: cells[0] for method, cells in table.lines}
    assert mean_stats(evaluation, "center", [METRIC])["b", METRIC].is_worse
    assert (cells["b"].best, cells["b"].worse) == (True, False)
    assert (cells["c"].best, cells["c"].worse) == (False, True)
