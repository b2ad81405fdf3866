"""A sweep as text: its table, and sentences about the best setting, its margin, trends, the Pareto front and failures."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipelines.evaluation.metrics import ALL_COLUMNS, higher_is_better
from pipelines.evaluation.table_rendering import Cell
from pipelines.sweeps.report.statistics import (
    SIGNIFICANCE_LEVEL,
    Axis,
    field_importance,
    format_value,
    label_axes,
    pooled_seed_std,
    scored_groups,
    spearman_trend,
    t_test_p_value,
    two_metric_front,
    varying_axes,
)
from pipelines.sweeps.results import (
    FAILED,
    FINISHED,
    STOPPED,
    SweepResult,
    TrialGroup,
    TrialRecord,
    comparator,
)

MAX_LISTED = 5  # settings that a sentence names; it counts the rest


def summary_sentences(result: SweepResult) -> list[str]:
    """The conclusions, most important first; never empty. Differences count only if they are significant over the seeds."""
    axes = label_axes(result)
    sentences = [
        *best_sentences(result, axes),
        *baseline_sentences(result),
        *_second_metric_sentences(result, axes),
    ]
    for metric in result.metrics[:2]:
        sentences += [sentence for axis in axes if (sentence := _trend_sentence(result, axis, metric))]
    sentences += [*_front_sentences(result, axes), *_importance_sentences(result), *_state_sentences(result)]
    return sentences


def unfinished_trials(result: SweepResult) -> list[str]:
    """One line per reason for which trials failed or were stopped, with the trials."""
    axes = label_axes(result)
    reasons: dict[tuple[str, str], list[TrialRecord]] = {}
    for state in (FAILED, STOPPED):
        for trial in result.trials:
            if trial.state == state:
                reasons.setdefault((state, " ".join(trial.reason.split()) or "no reason given"), []).append(
                    trial
                )
    return [
        f"{pluralize(len(trials), 'trial')} {state}: {reason} ({_list_trials(trials, axes)})"
        for (state, reason), trials in reasons.items()
    ]


def changed_values(result: SweepResult) -> list[str]:
    """One line per trial whose values changed during training."""
    return [
        f"trial {trial.number}: "
        + "; ".join(
            f"from step {step} on {', '.join(f'{path} {format_value(value)}' for path, value in values.items())}"
            for step, values in trial.changes
        )
        for trial in result.trials
        if trial.changes
    ]


def _list_trials(trials: Sequence[TrialRecord], axes: Sequence[Axis]) -> str:
    names = []
    for trial in trials[: 2 * MAX_LISTED]:
        words = [
            f"{path} {format_value(trial.values[path])}"
            for path in (a.path for a in axes)
            if path in trial.values
        ]
        words += [f"seed {trial.values['seed']}"] if "seed" in trial.values else []
        names.append(
            f"trial {trial.number}" + (f": {', '.join(words)}" if words else "") + f", step {trial.steps}"
        )
    remaining = len(trials) - 2 * MAX_LISTED
    return "; ".join(names) + (f"; and {remaining} more" if remaining > 0 else "")


def best_sentences(result: SweepResult, axes: Sequence[Axis]) -> Iterator[str]:
    metric, ranked = result.metrics[0], scored_groups(result, result.metrics[0])
    name = metric_title(metric)
    if not ranked:
        total = len(result.trials)
        finished = sum(trial.state == FINISHED for trial in result.trials)
        if finished:
            yield f"No setting has a {name}: {finished} of {pluralize(total, 'trial')} finished, none with a finite score."
        else:
            yield (
                f"No trial finished, of {total}: there is nothing to compare."
                if total
                else "There were no trials."
            )
        return
    best = ranked[0]
    score = f"{name} {format_mean_std(metric, best)}{metric_unit(metric)}"
    if len(ranked) == 1:
        yield f"Only one setting has a score: {setting_label(best, axes)}, {score}."
        return
    gap = abs(best.mean(metric) - ranked[1].mean(metric))
    margin = f"{format_score(metric, gap)}{metric_unit(metric)} over {setting_label(ranked[1], axes)}"
    std, degrees = pooled_seed_std(result, metric)
    margin_phrase = _margin_phrase(margin, gap, std, degrees, metric_unit(metric))
    yield f"Best is {setting_label(best, axes)}: {score}, {margin_phrase}"
    if degrees:
        similar = [
            group for group in ranked[1:] if t_test_p_value(result, best, group, metric) > SIGNIFICANCE_LEVEL
        ]
        relation = "above" if similar else "below"
        test = f"t tests with the seeds' pooled standard deviation, p {relation} {SIGNIFICANCE_LEVEL}"
        if similar:
            yield f"Not distinguishable from the best in {name} ({test}): {_list_settings(similar, axes)}."
        else:
            yield (
                f"All other settings are distinguishable from the best in {name} "
                f"({test}, not corrected for multiple tests)."
            )


def _margin_phrase(margin: str, difference: float, std: float, degrees: int, unit: str) -> str:
    if not degrees:
        return f"{margin}; with one seed per setting it is unknown how much of that is chance."
    if std == 0:
        return f"{margin}; all seeds score the same."
    return f"{margin}, {difference / std:.1f} times the standard deviation over the seeds of a setting ({std:.2g}{unit})."


def _list_settings(groups: Sequence[TrialGroup], axes: Sequence[Axis]) -> str:
    names = "; ".join(setting_label(group, axes) for group in groups[:MAX_LISTED])
    return names + (f"; and {len(groups) - MAX_LISTED} more" if len(groups) > MAX_LISTED else "")


def _second_metric_sentences(result: SweepResult, axes: Sequence[Axis]) -> Iterator[str]:
    """The best setting in the second metric, and the score of the best setting in it."""
    best = result.best_group
    for metric in result.metrics[1:2]:
        ranked = scored_groups(result, metric)
        if not best or len(ranked) < 2:
            continue
        score = f"{format_mean_std(metric, ranked[0])}{metric_unit(metric)}"
        if ranked[0].setting == best.setting:
            yield f"It is best in {metric_title(metric)} too: {score}."
            continue
        name, best_score = metric_title(metric), format_mean_std(metric, best)
        p = t_test_p_value(result, ranked[0], best, metric) if math.isfinite(best.mean(metric)) else math.nan
        yield (
            f"In {name} the best is {setting_label(ranked[0], axes)}: {score}; "
            f"the best in {metric_title(result.metrics[0])} has {best_score}"
            + ("; this difference is not significant over the seeds." if p > SIGNIFICANCE_LEVEL else ".")
        )


def baseline_sentences(result: SweepResult) -> Iterator[str]:
    """The best setting compared with the best classical method."""
    best = result.best_group
    for metric in result.metrics[:2]:
        scores = {
            name: values[metric]
            for name, values in result.baselines.items()
            if math.isfinite(values.get(metric, math.nan))
        }
        if not best or not scores or not math.isfinite(best.mean(metric)):
            continue
        select = max if higher_is_better(metric) else min
        method = select(scores, key=lambda name: scores[name])
        gap = f"{format_score(metric, abs(best.mean(metric) - scores[method]))}{metric_unit(metric)}"
        is_better = comparator(metric)(best.mean(metric), scores[method])
        yield (
            f"In {metric_title(metric)} the best setting is {gap} "
            f"{'better' if is_better else 'worse'} than the best untrained method, "
            f"{method} ({format_score(metric, scores[method])})."
        )


def _trend_sentence(result: SweepResult, axis: Axis, metric: str) -> str:
    trend = spearman_trend(result, axis, metric)
    if trend is None:
        return ""
    rho, p, n = trend
    numbers = f"Spearman's rho {rho:+.2f} over {n} settings, p = {p:.2g}"
    if p > SIGNIFICANCE_LEVEL:
        return f"{metric_title(metric)} shows no monotone trend with {axis.path} beyond chance ({numbers})."
    strength = "steadily" if abs(rho) >= 0.9 else "on the whole"
    return (
        f"{metric_title(metric)} {'rises' if rho > 0 else 'falls'} {strength} with {axis.path} ({numbers})."
    )


def _front_sentences(result: SweepResult, axes: Sequence[Axis]) -> Iterator[str]:
    if len(result.metrics) < 2 or len(result.groups) < 2:
        return
    front = two_metric_front(result)
    names = " and ".join(metric_title(metric) for metric in result.metrics[:2])
    if len(front) == 1:
        yield f"{setting_label(front[0], axes)} is better than every other setting in both {names}."
    elif front:
        yield f"Pareto front of {names}: {_list_settings(front, axes)}."


def _importance_sentences(result: SweepResult) -> Iterator[str]:
    for metric in result.metrics[:2] if len(varying_axes(result)) > 1 else ():
        importances = field_importance(result, metric)
        if isinstance(importances, str):
            yield f"Field importance for {metric_title(metric)} is unknown: {importances}."
            continue
        paths = sorted(importances, key=lambda path: -importances[path])
        percentages = ", ".join(f"{path} {importances[path]:.0%}" for path in paths[:MAX_LISTED])
        yield f"Of the variance of {metric_title(metric)} between settings, each field by itself explains: {percentages}."


def _state_sentences(result: SweepResult) -> Iterator[str]:
    counts = Counter(trial.state for trial in result.trials)
    if counts[FINISHED] and counts[FINISHED] < len(result.trials):
        others = ", ".join(f"{counts[state]} {state}" for state in (STOPPED, FAILED) if counts[state])
        yield f"{counts[FINISHED]} of {len(result.trials)} trials finished; {others}."
    changed = sum(bool(trial.changes) for trial in result.trials)
    if changed:
        yield (
            f"Population-based training changed values of {pluralize(changed, 'trial')}; "
            "settings are named by the initial values."
        )


_TITLES = {metric: (heading, decimals) for heading, metric, decimals in ALL_COLUMNS}


def metric_title(metric: str) -> str:
    """The metric's heading in tables, such as `PSNR hole`."""
    return _TITLES.get(metric, (metric, 4))[0]


def metric_unit(metric: str) -> str:
    """The metric's unit after a space, or ''."""
    return " dB" if metric.startswith("psnr") else ""


def format_score(metric: str, value: float) -> str:
    """A score with the metric's number of decimals; n/a if it is not finite."""
    return f"{value:.{_TITLES.get(metric, (metric, 4))[1]}f}" if math.isfinite(value) else "n/a"


def format_mean_std(metric: str, group: TrialGroup) -> str:
    """`22.31 ± 0.12`; without the deviation for one seed."""
    mean = format_score(metric, group.mean(metric))
    return (
        f"{mean} ± {format_score(metric, group.std(metric))}"
        if len(group.trials) > 1 and mean != "n/a"
        else mean
    )


def better_direction(metric: str) -> str:
    return "higher is better" if higher_is_better(metric) else "lower is better"


def pluralize(count: int, noun: str = "setting") -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def setting_label(group: TrialGroup, axes: Sequence[Axis]) -> str:
    """A setting by the fields in which settings differ: `edges.sigma 2, model.lambda_adv 0.001`."""
    words = [
        f"{axis.path} {format_value(group.values[axis.path])}" for axis in axes if axis.path in group.values
    ]
    return ", ".join(words) or "the recipe as it is"


@dataclass(frozen=True)
class SweepTable:
    """One row per setting, best first, and one per classical method; the first `setting_columns` hold the values."""

    headings: tuple[str, ...]
    setting_rows: tuple[tuple[Cell, ...], ...]
    baseline_rows: tuple[tuple[Cell, ...], ...]
    setting_columns: int


def sweep_table(result: SweepResult) -> SweepTable:
    """Per setting: values, number of seeds, mean ± standard deviation of each metric, steps, and states of its trials.

    The values of the best setting and the best mean of each metric are marked. Settings without a finished trial have
    no row.
    """
    axes, metrics = label_axes(result), result.metrics
    best = {
        m: format_score(m, order[0].mean(m)) for m in metrics if len(order := scored_groups(result, m)) > 1
    }
    setting_rows = []
    for group in result.ranked_groups:
        is_best = bool(best and result.best_group and group.setting == result.best_group.setting)
        values = [format_value(group.values.get(axis.path, "n/a")) for axis in axes] or ["as the recipe"]
        scores = [
            Cell(format_mean_std(m, group), format_score(m, group.mean(m)) == best.get(m) != "n/a")
            for m in metrics
        ]
        trial_cells = [Cell(_format_steps(group)), Cell(_format_states(result, group))]
        setting_rows.append(
            (*(Cell(value, is_best) for value in values), Cell(str(len(group.trials))), *scores, *trial_cells)
        )
    paths = tuple(axis.path for axis in axes) or ("setting",)
    baseline_rows = tuple(
        (
            Cell(name),
            *(Cell("") for _ in paths),
            *(Cell(format_score(metric, scores.get(metric, float("nan")))) for metric in metrics),
            Cell(""),
            Cell("not trained"),
        )
        for name, scores in result.baselines.items()
    )
    metric_headings = (f"{metric_title(m)}{metric_unit(m) and ',' + metric_unit(m)}" for m in metrics)
    return SweepTable(
        (*paths, "seeds", *metric_headings, "steps", "state"), tuple(setting_rows), baseline_rows, len(paths)
    )


def _format_steps(group: TrialGroup) -> str:
    steps = sorted({trial.steps for trial in group.trials})
    return str(steps[0]) if len(steps) == 1 else f"{steps[0]} to {steps[-1]}"


def _format_states(result: SweepResult, group: TrialGroup) -> str:
    """`finished`, or `2 finished, 1 failed` if not all trials of the setting finished."""
    counts = Counter(trial.state for trial in result.trials if trial.setting == group.setting)
    return (
        next(iter(counts)) if len(counts) == 1 else ", ".join(f"{n} {state}" for state, n in counts.items())
    )
