"""Which means of a table are known how well: intervals beside them, and differences to the best that are no chance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pipelines.evaluation.intervals import BOOTSTRAP_RESAMPLES, CONFIDENCE_LEVEL, MIN_PAIRS, bca_intervals
from pipelines.evaluation.metrics import finite_mean, higher_is_better
from pipelines.evaluation.results import EvaluationResult

WORSE_MARK = "↓"
_PERCENT = f"{100 * CONFIDENCE_LEVEL:.0f} %"
INTERVALS_NOTE = (
    f"Intervals: {_PERCENT} of the mean over photographs (BCa bootstrap, {BOOTSTRAP_RESAMPLES} draws); ± is half of its "
    "width. Distances of sets have none: they are no means over photographs"
)
WORSE_NOTE = (
    f"{WORSE_MARK} worse than the best of the column by more than chance: the {_PERCENT} interval of the paired difference "
    "does not contain 0"
)
TOO_FEW_NOTE = f"No intervals: fewer than {MIN_PAIRS} photographs"


@dataclass(frozen=True)
class MeanStats:
    """What is known of one mean of a table."""

    low: float | None = None
    """Ends of its interval; None: too few photographs, or no finite score."""
    high: float | None = None
    is_worse: bool = False
    """Whether it differs from the best mean of its column by more than chance."""


def has_best(metric: str) -> bool:
    """Whether a metric has a best value; total variation has none: a smooth fill has less than the photograph."""
    return not metric.startswith("tv")


def mean_stats(
    evaluation: EvaluationResult, masks: str, metrics: Sequence[str], band: str = "all"
) -> dict[tuple[str, str], MeanStats]:
    """(method, metric) -> the interval of its mean over the photographs of one hole-area band, and its comparison with
    the best method's. Means that do not exist are left out.

    Intervals and differences are over the photographs with finite scores, as the means are.
    """
    bands = evaluation.bands[masks]
    indices = [i for i, photo_band in enumerate(bands) if band in ("all", photo_band)]
    jobs: dict[tuple[str, str, str], np.ndarray] = {}
    """("mean" or "difference", method, metric) -> finite values"""
    always_worse: set[tuple[str, str]] = set()
    existing: list[tuple[str, str]] = []
    for metric in metrics:
        columns = _complete_columns(evaluation, masks, metric, indices)
        existing += [(method, metric) for method in columns]
        for method, column in columns.items():
            jobs["mean", method, metric] = column[np.isfinite(column)]
        best = _best_method(columns, metric)
        for method, column in columns.items():
            if not best or method == best:
                continue
            both_finite = np.isfinite(column) & np.isfinite(columns[best])
            if not both_finite.any() and np.isfinite(column).all():
                if len(column) >= MIN_PAIRS:  # the best is exact on every photograph
                    always_worse.add((method, metric))
            else:
                jobs["difference", method, metric] = column[both_finite] - columns[best][both_finite]
    ends = _intervals(jobs)
    stats = {}
    for method, metric in existing:
        low, high = ends["mean", method, metric]
        lower, upper = ends.get(("difference", method, metric), (None, None))
        is_worse = (method, metric) in always_worse
        if lower is not None and upper is not None and not lower <= 0 <= upper:
            is_worse = (upper < 0) == higher_is_better(metric)
        stats[method, metric] = MeanStats(low, high, is_worse)
    return stats


def card_stats(
    evaluation: EvaluationResult, method: str, baselines: Sequence[str], metrics: Sequence[str]
) -> dict[str, Any]:
    """What a version records for its model card: `intervals` ("masks/metric" -> ends, of `method`) and `worse`
    (method -> ["masks/metric"]): the means that are worse by more than chance than the best of `method` and `baselines`."""
    shown = replace(evaluation, methods=(method, *baselines))
    intervals: dict[str, list[float]] = {}
    worse: dict[str, list[str]] = {}
    for masks in evaluation.bands:
        for (name, metric), entry in mean_stats(shown, masks, metrics).items():
            column = f"{masks}/{metric}"
            if name == method and entry.low is not None and entry.high is not None:
                intervals[column] = [float(f"{end:.6g}") for end in (entry.low, entry.high)]
            if entry.is_worse:
                worse.setdefault("" if name == method else name, []).append(column)
    return {"intervals": intervals, "worse": worse}


def _complete_columns(
    evaluation: EvaluationResult, masks: str, metric: str, indices: Sequence[int]
) -> dict[str, np.ndarray]:
    """Method -> its scores of the photographs, for the methods that have all of them: those with a mean."""
    columns = {}
    for method in evaluation.methods:
        failed = evaluation.failures.get(masks, {}).get(method, {})
        column = evaluation.values[masks][method].get(metric)
        if column is None or any(i in failed for i in indices):
            continue
        values = [value for i in indices if (value := column[i]) is not None]
        if indices and len(values) == len(indices):
            columns[method] = np.array(values, np.float64)
    return columns


def _best_method(columns: Mapping[str, np.ndarray], metric: str) -> str:
    """The method with the best mean; '' without methods, or if no value of the metric is best."""
    if not columns or not has_best(metric):
        return ""
    means = {method: finite_mean(column)[0] for method, column in columns.items()}
    # infinite means are those of exact results: best for PSNR, the only metric that has them
    return (max if higher_is_better(metric) else min)(means, key=lambda method: means[method])


def _intervals(
    jobs: Mapping[tuple[str, str, str], np.ndarray],
) -> dict[tuple[str, str, str], tuple[float | None, float | None]]:
    """The interval of each mean; those over equally many photographs are computed together."""
    ends: dict[tuple[str, str, str], tuple[float | None, float | None]] = dict.fromkeys(jobs, (None, None))
    for count in sorted({len(values) for values in jobs.values()}):
        keys = [key for key, values in jobs.items() if len(values) == count]
        for key, (low, high) in zip(keys, bca_intervals(np.stack([jobs[key] for key in keys])), strict=True):
            if not math.isnan(low):
                ends[key] = float(low), float(high)
    return ends
