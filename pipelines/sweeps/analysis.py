"""What a sweep's trials say, as numbers: axes of its fields, responses, the seeds' noise, trends and importance."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from scipy import stats

from pipelines.evaluation.metrics import higher_is_better
from pipelines.evaluation.tables import COLUMNS
from pipelines.sweeps.result import SEED, Group, SweepResult, hashable, ranked

DECADES_FOR_LOG = 2
CHANCE = 0.05  # the level below which a difference is called one
MOST_TICKS = 9
_HEADINGS = {metric: (heading, decimals) for heading, metric, decimals in COLUMNS} | {
    "fd": ("FD", 2),
    "kid": ("KID", 4),
}


@dataclass(frozen=True)
class Axis:
    """Where the values of one field stand on a picture's axis."""

    path: str
    kind: Literal["linear", "log", "places"]
    """places: words, switches and lists, one beside the other in the recipe's order."""
    values: tuple[Any, ...]
    """Every value that a trial had, once, in the axis' order."""
    listed: bool
    """The values come from a list (grid, choice), not from a range."""

    @cached_property
    def _left(self) -> float:
        """Where 0 stands on a logarithmic axis: a place of its own left of the smallest value."""
        powers = [math.log10(value) for value in self.values if value > 0]
        return min(powers) - max(0.4, 0.14 * (max(powers) - min(powers)))

    def position(self, value: Any) -> float:
        if self.kind == "places":
            return float(self.values.index(value))
        if self.kind == "linear":
            return float(value)
        return math.log10(value) if value > 0 else self._left

    @property
    def broken(self) -> float | None:
        """Position of the break between 0 and the rest of a logarithmic axis; None when it has no 0."""
        if self.kind != "log" or self.values[0] != 0:
            return None
        return (self._left + self.position(self.values[1])) / 2

    @property
    def ends(self) -> tuple[float, float]:
        return self.position(self.values[0]), self.position(self.values[-1])

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """(position, label): the values themselves when they come from a short list, else round numbers."""
        if self.kind == "places" or (self.listed and len(self.values) <= MOST_TICKS):
            return self._apart([(self.position(value), shown(value)) for value in self.values])
        low, high = self.ends
        if self.kind == "linear":
            return [(float(t), shown(float(t))) for t in round_numbers(low, high)]
        zero = [] if self.broken is None else [(low, "0")]
        low = self.position(next(value for value in self.values if value > 0))
        powers = range(math.ceil(low - 1e-9), math.floor(high + 1e-9) + 1)
        if len(powers) < 3:
            return zero + [
                (p + math.log10(m), shown(m * 10.0**p))
                for p in range(math.floor(low), math.ceil(high) + 1)
                for m in (1, 2, 5)
                if low - 1e-9 <= p + math.log10(m) <= high + 1e-9
            ]
        return zero + [(float(p), shown(10.0**p)) for p in powers[:: math.ceil(len(powers) / 6)]]

    def _apart(self, ticks: list[tuple[float, str]]) -> list[tuple[float, str]]:
        """Without those that stand too near the one before; the break's two sides may be near."""
        low, high = self.ends
        kept = ticks[:1]
        for tick in ticks[1:]:
            if self.kind == "places" or tick[0] - kept[-1][0] > 0.055 * (high - low):
                kept.append(tick)
        return kept


@dataclass(frozen=True)
class Response:
    """One setting's answer in one metric: the mean and sample standard deviation over its seeds, and their scores."""

    value: Any
    group: Group
    mean: float
    spread: float
    scores: tuple[float, ...]


def axis_of(result: SweepResult, path: str) -> Axis:
    """The axis of one field: logarithmic for log-uniform ranges, and for lists that span two decades or more."""
    spec = {kind: given for kind, given in result.fields.get(path, {}).items() if given is not None}
    found = list(dict.fromkeys(trial.values[path] for trial in result.trials if path in trial.values))
    listed = not {"uniform", "loguniform"} & set(spec)
    if not all(isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in found):
        order = [hashable(value) for value in spec.get("grid") or spec.get("choice") or ()]
        found.sort(key=lambda value: order.index(value) if value in order else len(order))
        return Axis(path, "places", tuple(found), listed=True)
    found.sort()
    above = [value for value in found if value > 0]
    wide = listed and len(above) > 1 and above[-1] / above[0] >= 10**DECADES_FOR_LOG
    log = bool(above) and found[0] >= 0 and ("loguniform" in spec or wide)
    return Axis(path, "log" if log else "linear", tuple(found), listed)


def varied(result: SweepResult) -> list[Axis]:
    """The axes of the fields that trials differ in, but for the seed."""
    axes = [axis_of(result, path) for path in result.fields if path != SEED]
    return [axis for axis in axes if len(axis.values) > 1]


def named_by(result: SweepResult) -> list[Axis]:
    """The axes that tell settings apart; where there is one setting, of all fields."""
    return varied(result) or [axis_of(result, path) for path in result.fields if path != SEED]


def response(result: SweepResult, path: str, metric: str) -> list[Response]:
    """A row for each setting that has the metric, along the field's axis."""
    axis = axis_of(result, path)
    rows = [
        Response(
            group.values[path],
            group,
            group.mean(metric),
            group.spread(metric),
            tuple(trial.scores[metric] for trial in group.trials),
        )
        for group in scored(result, metric)
        if path in group.values
    ]
    return sorted(rows, key=lambda row: axis.position(row.value))


def profile(rows: Sequence[Response]) -> list[tuple[Any, float]]:
    """(value, mean over the settings that have it), in the rows' order."""
    values = dict.fromkeys(row.value for row in rows)
    return [(v, float(np.mean([row.mean for row in rows if row.value == v]))) for v in values]


def scored(result: SweepResult, metric: str) -> list[Group]:
    """The settings with a finite mean of the metric, best first."""
    return ranked([group for group in result.groups if math.isfinite(group.mean(metric))], metric)


def front(result: SweepResult) -> list[Group]:
    """The settings that no other beats in both of the first two metrics, by the first, best first."""
    return replace(result, metrics=result.metrics[:2]).front


def noise(result: SweepResult, metric: str) -> tuple[float, int]:
    """The seeds' standard deviation pooled over the settings, and its degrees of freedom; (nan, 0) without repeats."""
    groups = scored(result, metric)
    freedom = sum(len(group.trials) - 1 for group in groups)
    if not freedom:
        return math.nan, 0
    squares = sum((len(group.trials) - 1) * group.spread(metric) ** 2 for group in groups)
    return math.sqrt(squares / freedom), freedom


def chance(result: SweepResult, a: Group, b: Group, metric: str) -> float:
    """The probability of so large a difference between two settings by the seeds alone (Student's t, pooled)."""
    deviation, freedom = noise(result, metric)
    apart = abs(a.mean(metric) - b.mean(metric))
    if not freedom:
        return math.nan
    error = deviation * math.sqrt(1 / len(a.trials) + 1 / len(b.trials))
    if error == 0:
        return 0.0 if apart else 1.0
    return float(2 * stats.t.sf(apart / error, freedom))


def trend(result: SweepResult, axis: Axis, metric: str) -> tuple[float, float, int] | None:
    """(Spearman's rho, its p value by permutation, n settings); None for words or fewer than five settings."""
    rows = response(result, axis.path, metric)
    if axis.kind == "places" or len(rows) < 5:
        return None
    x, y = ([stats.rankdata(column)] for column in ([row.value for row in rows], [row.mean for row in rows]))
    (x,), (y,) = x, y
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return None

    def rho(shuffled: np.ndarray, axis: int) -> np.ndarray:
        centred = y - y.mean()
        return ((shuffled - x.mean()) * centred).sum(axis) / (len(x) * x.std() * y.std())

    found = stats.permutation_test(
        (x,), rho, permutation_type="pairings", vectorized=True, n_resamples=9999, rng=0
    )
    return float(found.statistic), float(found.pvalue), len(rows)


def importance(result: SweepResult, metric: str) -> dict[str, float] | str:
    """The share of the variance between settings that each field explains by itself, or why that cannot be said.

    Functional ANOVA on a random forest (Hutter et al. 2014, optuna's), on the places along the fields' axes: a
    logarithmic axis counts its decades alike, and so does a list its values. What is missing to 1 is interplay.
    """
    axes, groups = varied(result), scored(result, metric)
    if len(groups) < 2 * len(axes):
        return f"{len(groups)} settings with a score are too few for {len(axes)} fields: {2 * len(axes)} are needed"
    means = [group.mean(metric) for group in groups]
    if np.ptp(means) < 1e-12 * max(map(abs, means)):
        return "all settings score the same"
    repeats = [[trial.scores[metric] for trial in group.trials] for group in groups if len(group.trials) > 1]
    if len(repeats) > 1 and np.ptp(np.concatenate(repeats)) > 0:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", stats.ConstantInputWarning
            )  # repeats that agree to the last digit
            p = float(stats.f_oneway(*repeats).pvalue)
        if p > CHANCE:
            return f"settings differ no more than seeds of one setting do (F test, p = {p:.2g})"
    return _fanova(axes, groups, means)


def _fanova(axes: Sequence[Axis], groups: Sequence[Group], means: Sequence[float]) -> dict[str, float]:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    distributions: dict[str, Any] = {}
    places: dict[str, list[Any]] = {}
    for axis in axes:
        values = [group.values[axis.path] for group in groups]
        if axis.kind == "places":
            distributions[axis.path] = optuna.distributions.CategoricalDistribution(range(len(axis.values)))
        elif axis.listed:
            distributions[axis.path] = optuna.distributions.IntDistribution(0, len(axis.values) - 1)
        else:
            distributions[axis.path] = optuna.distributions.FloatDistribution(*axis.ends)
        ranks = axis.listed or axis.kind == "places"
        places[axis.path] = [axis.values.index(v) if ranks else axis.position(v) for v in values]
    study = optuna.create_study()
    study.add_trials(
        [
            optuna.trial.create_trial(
                params={path: found[i] for path, found in places.items()},
                distributions=distributions,
                value=mean,
            )
            for i, mean in enumerate(means)
        ]
    )
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", optuna.exceptions.ExperimentalWarning
        )  # of `normalize`, there since 3.0
        return optuna.importance.get_param_importances(study, evaluator=evaluator, normalize=False)


def heading(metric: str) -> str:
    """`PSNR hole`: as the tables call it."""
    return _HEADINGS.get(metric, (metric, 4))[0]


def unit(metric: str) -> str:
    """With the space before it."""
    return " dB" if metric.startswith("psnr") else ""


def figure(metric: str, value: float) -> str:
    """A score with the metric's decimals; n/a when there is none."""
    return f"{value:.{_HEADINGS.get(metric, (metric, 4))[1]}f}" if math.isfinite(value) else "n/a"


def with_spread(metric: str, group: Group) -> str:
    """`22.31 ± 0.12`, without the spread when there is one seed."""
    mean = figure(metric, group.mean(metric))
    return (
        f"{mean} ± {figure(metric, group.spread(metric))}"
        if len(group.trials) > 1 and mean != "n/a"
        else mean
    )


def direction(metric: str) -> str:
    return "higher is better" if higher_is_better(metric) else "lower is better"


def shown(value: Any) -> str:
    """A field's value as a recipe has it, numbers to four digits: 0.001, 1e-05, true, [1, 2], none."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(shown, value))}]"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "none"}[value]
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def how_many(count: int, what: str = "setting") -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def called(group: Group, axes: Sequence[Axis]) -> str:
    """A setting in words, by the fields that settings differ in: `edges.sigma 2, model.lambda_adv 0.001`."""
    words = [f"{axis.path} {shown(group.values[axis.path])}" for axis in axes if axis.path in group.values]
    return ", ".join(words) or "the recipe as it is"


def round_numbers(low: float, high: float) -> list[float]:
    """Four to seven of them between low and high."""
    power = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if (high - low) / (m * power) <= 6)
    return [
        round(k * step, 12) for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    ]
