"""Statistics of a sweep's trials: axes of its fields, scores per field, seed noise, trends and field importance."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from scipy import stats

from pipelines.sweeps.results import SEED, SweepResult, TrialGroup, as_hashable, rank_groups

DECADES_FOR_LOG = 2
SIGNIFICANCE_LEVEL = 0.05  # a difference is called significant if p is at most this
MAX_TICKS = 9


@dataclass(frozen=True)
class Axis:
    """The axis of one field: positions of its values, and ticks."""

    path: str
    kind: Literal["linear", "log", "categorical"]
    """categorical: texts, booleans and lists, at integer positions in the recipe's order."""
    values: tuple[Any, ...]
    """The distinct values of the trials, in the axis' order."""
    listed: bool
    """Whether the values come from a list (grid, choice), not from a range."""

    @cached_property
    def _zero_position(self) -> float:
        """The position of 0 on a logarithmic axis: left of the smallest positive value."""
        powers = [math.log10(value) for value in self.values if value > 0]
        return min(powers) - max(0.4, 0.14 * (max(powers) - min(powers)))

    def position(self, value: Any) -> float:
        if self.kind == "categorical":
            return float(self.values.index(value))
        if self.kind == "linear":
            return float(value)
        return math.log10(value) if value > 0 else self._zero_position

    @property
    def break_position(self) -> float | None:
        """The position of the break between 0 and the rest of a logarithmic axis; None if there is no 0."""
        if self.kind != "log" or self.values[0] != 0:
            return None
        return (self._zero_position + self.position(self.values[1])) / 2

    @property
    def ends(self) -> tuple[float, float]:
        return self.position(self.values[0]), self.position(self.values[-1])

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """(position, label): the values themselves if they come from a short list, else round numbers."""
        if self.kind == "categorical" or (self.listed and len(self.values) <= MAX_TICKS):
            return self._thin_out([(self.position(value), format_value(value)) for value in self.values])
        low, high = self.ends
        if self.kind == "linear":
            return [(float(t), format_value(float(t))) for t in round_numbers(low, high)]
        zero = [] if self.break_position is None else [(low, "0")]
        low = self.position(next(value for value in self.values if value > 0))
        powers = range(math.ceil(low - 1e-9), math.floor(high + 1e-9) + 1)
        if len(powers) < 3:
            return zero + [
                (p + math.log10(m), format_value(m * 10.0**p))
                for p in range(math.floor(low), math.ceil(high) + 1)
                for m in (1, 2, 5)
                if low - 1e-9 <= p + math.log10(m) <= high + 1e-9
            ]
        return zero + [(float(p), format_value(10.0**p)) for p in powers[:: math.ceil(len(powers) / 6)]]

    def _thin_out(self, ticks: list[tuple[float, str]]) -> list[tuple[float, str]]:
        """The ticks without those too close to the previous one."""
        low, high = self.ends
        spaced = ticks[:1]
        for tick in ticks[1:]:
            if self.kind == "categorical" or tick[0] - spaced[-1][0] > 0.055 * (high - low):
                spaced.append(tick)
        return spaced


@dataclass(frozen=True)
class ResponsePoint:
    """One setting in a plot of a metric against a field: mean and sample standard deviation over its seeds, and scores."""

    value: Any
    group: TrialGroup
    mean: float
    std: float
    scores: tuple[float, ...]


def field_axis(result: SweepResult, path: str) -> Axis:
    """The axis of one field: logarithmic for log-uniform ranges and for lists that span two decades or more."""
    search_space = {
        kind: bounds for kind, bounds in result.fields.get(path, {}).items() if bounds is not None
    }
    values = list(dict.fromkeys(trial.values[path] for trial in result.trials if path in trial.values))
    listed = not {"uniform", "loguniform"} & set(search_space)
    if not all(isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in values):
        order = [as_hashable(value) for value in search_space.get("grid") or search_space.get("choice") or ()]
        values.sort(key=lambda value: order.index(value) if value in order else len(order))
        return Axis(path, "categorical", tuple(values), listed=True)
    values.sort()
    positive = [value for value in values if value > 0]
    spans_decades = listed and len(positive) > 1 and positive[-1] / positive[0] >= 10**DECADES_FOR_LOG
    is_log = bool(positive) and values[0] >= 0 and ("loguniform" in search_space or spans_decades)
    return Axis(path, "log" if is_log else "linear", tuple(values), listed)


def varying_axes(result: SweepResult) -> list[Axis]:
    """The axes of the fields in which trials differ, except the seed."""
    axes = [field_axis(result, path) for path in result.fields if path != SEED]
    return [axis for axis in axes if len(axis.values) > 1]


def label_axes(result: SweepResult) -> list[Axis]:
    """The axes whose values label a setting: the varying ones; for a single setting, all."""
    return varying_axes(result) or [field_axis(result, path) for path in result.fields if path != SEED]


def response_points(result: SweepResult, path: str, metric: str) -> list[ResponsePoint]:
    """One point per setting with a finite mean of the metric, in the order of the field's axis."""
    axis = field_axis(result, path)
    points = [
        ResponsePoint(
            group.values[path],
            group,
            group.mean(metric),
            group.std(metric),
            tuple(trial.scores[metric] for trial in group.trials),
        )
        for group in scored_groups(result, metric)
        if path in group.values
    ]
    return sorted(points, key=lambda point: axis.position(point.value))


def mean_per_value(points: Sequence[ResponsePoint]) -> list[tuple[Any, float]]:
    """(value, mean over the settings with it), in the order of the points."""
    values = dict.fromkeys(point.value for point in points)
    return [(v, float(np.mean([point.mean for point in points if point.value == v]))) for v in values]


def scored_groups(result: SweepResult, metric: str) -> list[TrialGroup]:
    """The groups with a finite mean of the metric, best first."""
    return rank_groups([group for group in result.groups if math.isfinite(group.mean(metric))], metric)


def two_metric_front(result: SweepResult) -> list[TrialGroup]:
    """The Pareto front over the first two metrics only, best first by the first metric."""
    return replace(result, metrics=result.metrics[:2]).pareto_front


def pooled_seed_std(result: SweepResult, metric: str) -> tuple[float, int]:
    """The seeds' standard deviation pooled over the settings, and its degrees of freedom; (nan, 0) with one seed each."""
    groups = scored_groups(result, metric)
    degrees = sum(len(group.trials) - 1 for group in groups)
    if not degrees:
        return math.nan, 0
    squares = sum((len(group.trials) - 1) * group.std(metric) ** 2 for group in groups)
    return math.sqrt(squares / degrees), degrees


def t_test_p_value(result: SweepResult, a: TrialGroup, b: TrialGroup, metric: str) -> float:
    """The p value of the difference between two groups: Student's t test with the pooled deviation; nan with one seed."""
    std, degrees = pooled_seed_std(result, metric)
    difference = abs(a.mean(metric) - b.mean(metric))
    if not degrees:
        return math.nan
    error = std * math.sqrt(1 / len(a.trials) + 1 / len(b.trials))
    if error == 0:
        return 0.0 if difference else 1.0
    return float(2 * stats.t.sf(difference / error, degrees))


def spearman_trend(result: SweepResult, axis: Axis, metric: str) -> tuple[float, float, int] | None:
    """(Spearman's rho, its p value by permutation, number of settings).

    None for categories, for constant values or scores, or for fewer than five settings.
    """
    points = response_points(result, axis.path, metric)
    if axis.kind == "categorical" or len(points) < 5:
        return None
    x, y = (
        [stats.rankdata(column)]
        for column in ([point.value for point in points], [point.mean for point in points])
    )
    (x,), (y,) = x, y
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return None

    def rho(shuffled: np.ndarray, axis: int) -> np.ndarray:
        centred = y - y.mean()
        return ((shuffled - x.mean()) * centred).sum(axis) / (len(x) * x.std() * y.std())

    test = stats.permutation_test(
        (x,), rho, permutation_type="pairings", vectorized=True, n_resamples=9999, rng=0
    )
    return float(test.statistic), float(test.pvalue), len(points)


def field_importance(result: SweepResult, metric: str) -> dict[str, float] | str:
    """The fraction of the variance between settings that each field explains by itself, or the reason why it is unknown.

    Functional ANOVA on a random forest (Hutter et al. 2014, Optuna's implementation). Its inputs are positions on the
    fields' axes, so all decades of a logarithmic axis weigh the same, as do all values of a list. The rest up to 1 is
    interactions of fields.
    """
    axes, groups = varying_axes(result), scored_groups(result, metric)
    if len(groups) < 2 * len(axes):
        return f"{len(groups)} settings with a score are too few for {len(axes)} fields: {2 * len(axes)} are needed"
    means = [group.mean(metric) for group in groups]
    if np.ptp(means) < 1e-12 * max(map(abs, means)):
        return "all settings score the same"
    repeats = [[trial.scores[metric] for trial in group.trials] for group in groups if len(group.trials) > 1]
    if len(repeats) > 1 and np.ptp(np.concatenate(repeats)) > 0:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", stats.ConstantInputWarning)  # identical scores of all seeds
            p = float(stats.f_oneway(*repeats).pvalue)
        if p > SIGNIFICANCE_LEVEL:
            return f"settings differ no more than seeds of one setting do (F test, p = {p:.2g})"
    return _fanova(axes, groups, means)


def _fanova(axes: Sequence[Axis], groups: Sequence[TrialGroup], means: Sequence[float]) -> dict[str, float]:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    distributions: dict[str, Any] = {}
    params: dict[str, list[Any]] = {}
    for axis in axes:
        values = [group.values[axis.path] for group in groups]
        if axis.kind == "categorical":
            distributions[axis.path] = optuna.distributions.CategoricalDistribution(range(len(axis.values)))
        elif axis.listed:
            distributions[axis.path] = optuna.distributions.IntDistribution(0, len(axis.values) - 1)
        else:
            distributions[axis.path] = optuna.distributions.FloatDistribution(*axis.ends)
        uses_indices = axis.listed or axis.kind == "categorical"
        params[axis.path] = [axis.values.index(v) if uses_indices else axis.position(v) for v in values]
    study = optuna.create_study()
    study.add_trials(
        [
            optuna.trial.create_trial(
                params={path: positions[i] for path, positions in params.items()},
                distributions=distributions,
                value=mean,
            )
            for i, mean in enumerate(means)
        ]
    )
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # about `normalize`
        return optuna.importance.get_param_importances(study, evaluator=evaluator, normalize=False)


def format_value(value: Any) -> str:
    """A field's value as in a recipe, numbers to four digits: 0.001, 1e-05, true, [1, 2], none."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(format_value, value))}]"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "none"}[value]
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def round_numbers(low: float, high: float) -> list[float]:
    """Four to seven round numbers between low and high."""
    power = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if (high - low) / (m * power) <= 6)
    return [
        round(k * step, 12) for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    ]
