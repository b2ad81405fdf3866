"""What a sweep shows, in plain sentences that are computed: the best, by how much, trends, the front, what went wrong."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence

from pipelines.evaluation.metrics import higher_is_better
from pipelines.sweeps.analysis import (
    CHANCE,
    Axis,
    called,
    chance,
    figure,
    front,
    heading,
    how_many,
    importance,
    named_by,
    noise,
    scored,
    shown,
    trend,
    unit,
    varied,
    with_spread,
)
from pipelines.sweeps.result import FAILED, FINISHED, STOPPED, Group, SweepResult, Trial, better

MANY = 5  # settings that a sentence names before it only counts the rest


def sentences(result: SweepResult) -> list[str]:
    """The findings, most important first; never empty. Differences are called so only when the seeds bear it."""
    axes = named_by(result)
    found = [*_winner(result, axes), *_baselines(result), *_second(result, axes)]
    for metric in result.metrics[:2]:
        found += [sentence for axis in axes if (sentence := _trend(result, axis, metric))]
    found += [*_front(result, axes), *_importance(result), *_course(result)]
    return found


def unfinished(result: SweepResult) -> list[str]:
    """A line for each reason that trials failed or were stopped for, with the trials."""
    axes = named_by(result)
    reasons: dict[tuple[str, str], list[Trial]] = {}
    for state in (FAILED, STOPPED):
        for trial in result.trials:
            if trial.state == state:
                reasons.setdefault((state, " ".join(trial.reason.split()) or "no reason given"), []).append(
                    trial
                )
    return [
        f"{how_many(len(trials), 'trial')} {state}: {reason} ({_named(trials, axes)})"
        for (state, reason), trials in reasons.items()
    ]


def changes(result: SweepResult) -> list[str]:
    """A line for each trial whose values were changed on the way."""
    return [
        f"trial {trial.number}: "
        + "; ".join(
            f"from step {step} on {', '.join(f'{path} {shown(value)}' for path, value in values.items())}"
            for step, values in trial.changes
        )
        for trial in result.trials
        if trial.changes
    ]


def _named(trials: Sequence[Trial], axes: Sequence[Axis]) -> str:
    names = []
    for trial in trials[: 2 * MANY]:
        words = [
            f"{path} {shown(trial.values[path])}" for path in (a.path for a in axes) if path in trial.values
        ]
        words += [f"seed {trial.values['seed']}"] if "seed" in trial.values else []
        names.append(
            f"trial {trial.number}" + (f": {', '.join(words)}" if words else "") + f", step {trial.steps}"
        )
    rest = len(trials) - 2 * MANY
    return "; ".join(names) + (f"; and {rest} more" if rest > 0 else "")


def _winner(result: SweepResult, axes: Sequence[Axis]) -> Iterator[str]:
    first, order = result.metrics[0], scored(result, result.metrics[0])
    name = heading(first)
    if not order:
        total = len(result.trials)
        finished = sum(trial.state == FINISHED for trial in result.trials)
        if finished:
            yield f"No setting has a {name}: {finished} of {how_many(total, 'trial')} finished, none with a finite one."
        else:
            yield (
                f"No trial finished, of {total}: there is nothing to compare."
                if total
                else "There were no trials."
            )
        return
    best = order[0]
    score = f"{name} {with_spread(first, best)}{unit(first)}"
    if len(order) == 1:
        yield f"Only one setting has a score: {called(best, axes)}, {score}."
        return
    gap = abs(best.mean(first) - order[1].mean(first))
    over = f"{figure(first, gap)}{unit(first)} over {called(order[1], axes)}"
    deviation, freedom = noise(result, first)
    yield f"Best is {called(best, axes)}: {score}, {_margin(over, gap, deviation, freedom, unit(first))}"
    if freedom:
        alike = [group for group in order[1:] if chance(result, best, group, first) > CHANCE]
        test = f"by t tests on the seeds' pooled spread, p {'above' if alike else 'below'} {CHANCE}"
        if alike:
            yield f"Not distinguishable from the best in {name} ({test}): {_several(alike, axes)}."
        else:
            yield f"All other settings are distinguishable from the best in {name} ({test}, each test by itself)."


def _margin(over: str, gap: float, deviation: float, freedom: int, unit: str) -> str:
    if not freedom:
        return f"{over}; with one seed a setting it is not known how much of that is chance."
    if deviation == 0:
        return f"{over}; the seeds agree."
    return (
        f"{over}, {gap / deviation:.1f} times the spread of the seeds of one setting ({deviation:.2g}{unit})."
    )


def _several(groups: Sequence[Group], axes: Sequence[Axis]) -> str:
    names = "; ".join(called(group, axes) for group in groups[:MANY])
    return names + (f"; and {len(groups) - MANY} more" if len(groups) > MANY else "")


def _second(result: SweepResult, axes: Sequence[Axis]) -> Iterator[str]:
    """Where the second metric has its best, and what the winner has in it."""
    best = result.best
    for metric in result.metrics[1:2]:
        order = scored(result, metric)
        if not best or len(order) < 2:
            continue
        score = f"{with_spread(metric, order[0])}{unit(metric)}"
        if order[0].setting == best.setting:
            yield f"It is best in {heading(metric)} too: {score}."
            continue
        name, own = heading(metric), with_spread(metric, best)
        p = chance(result, order[0], best, metric) if math.isfinite(best.mean(metric)) else math.nan
        yield (
            f"In {name} the best is {called(order[0], axes)}: {score}; the best in {heading(result.metrics[0])} has {own}"
            + (", which the seeds do not tell apart." if p > CHANCE else ".")
        )


def _baselines(result: SweepResult) -> Iterator[str]:
    """Whether the best setting beats every classical method."""
    best = result.best
    for metric in result.metrics[:2]:
        scores = {n: s[metric] for n, s in result.baselines.items() if math.isfinite(s.get(metric, math.nan))}
        if not best or not scores or not math.isfinite(best.mean(metric)):
            continue
        pick = max if higher_is_better(metric) else min
        method = pick(scores, key=lambda name: scores[name])
        gap = f"{figure(metric, abs(best.mean(metric) - scores[method]))}{unit(metric)}"
        won = better(metric)(best.mean(metric), scores[method])
        yield (
            f"In {heading(metric)} the best setting is {gap} {'better' if won else 'worse'} than the best untrained method, "
            f"{method} ({figure(metric, scores[method])})."
        )


def _trend(result: SweepResult, axis: Axis, metric: str) -> str:
    found = trend(result, axis, metric)
    if found is None:
        return ""
    rho, p, n = found
    numbers = f"Spearman's rho {rho:+.2f} over {n} settings, p = {p:.2g}"
    if p > CHANCE:
        return f"{heading(metric)} shows no monotone trend with {axis.path} beyond chance ({numbers})."
    strength = "steadily" if abs(rho) >= 0.9 else "on the whole"
    return f"{heading(metric)} {'rises' if rho > 0 else 'falls'} {strength} with {axis.path} ({numbers})."


def _front(result: SweepResult, axes: Sequence[Axis]) -> Iterator[str]:
    if len(result.metrics) < 2 or len(result.groups) < 2:
        return
    on = front(result)
    names = " and ".join(heading(metric) for metric in result.metrics[:2])
    if len(on) == 1:
        yield f"{called(on[0], axes)} beats every other setting in {names} together."
    elif on:
        yield f"No other setting beats these in both {names}: {_several(on, axes)}."


def _importance(result: SweepResult) -> Iterator[str]:
    for metric in result.metrics[:2] if len(varied(result)) > 1 else ():
        shares = importance(result, metric)
        if isinstance(shares, str):
            yield f"Which field matters for {heading(metric)} cannot be said: {shares}."
            continue
        order = sorted(shares, key=lambda path: -shares[path])
        named = ", ".join(f"{path} {shares[path]:.0%}" for path in order[:MANY])
        yield f"Of the differences between settings in {heading(metric)}, each field by itself explains: {named}."


def _course(result: SweepResult) -> Iterator[str]:
    counts = Counter(trial.state for trial in result.trials)
    if counts[FINISHED] and counts[FINISHED] < len(result.trials):
        rest = ", ".join(f"{counts[state]} {state}" for state in (STOPPED, FAILED) if counts[state])
        yield f"{counts[FINISHED]} of {len(result.trials)} trials finished; {rest}."
    changed = sum(bool(trial.changes) for trial in result.trials)
    if changed:
        yield (
            f"In {how_many(changed, 'trial')} values were changed during training (population-based training): settings are "
            "named by the values that trials began with."
        )
