"""Pictures of a sweep: scores against one field, as EdgeConnect's figure 6 draws them against sigma."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from matplotlib.axes import Axes

from pipelines.sweeps.analysis import (
    Axis,
    Response,
    direction,
    figure,
    heading,
    how_many,
    profile,
    response,
    unit,
    varied,
)
from pipelines.sweeps.drawing import (
    BEST,
    BLUE,
    PALE,
    SOFT,
    Sheet,
    clipped,
    horizontal,
    label_points,
    margin_labels,
    styled,
    titled,
    vertical,
    wide,
)
from pipelines.sweeps.result import SweepResult

FEW = 12  # so many settings can be joined by a line whatever their values


@styled
def response_png(result: SweepResult, axis: Axis) -> bytes:
    """The first two metrics against one field: means over the seeds, their deviation, and every single trial."""
    rows = {metric: response(result, axis.path, metric) for metric in result.metrics[:2]}
    rows = {metric: found for metric, found in rows.items() if found}
    others = len(varied(result)) > 1
    near = {metric: _baselines(result, metric, _extent(found)) for metric, found in rows.items()}
    sheet = Sheet(
        [2.15] * len(rows),
        _response_note(result, axis, rows, others),
        right=1.05 if any(inside for inside, _ in near.values()) else 0.25,
    )
    for ax, (metric, found) in zip(sheet.axes, rows.items(), strict=True):
        horizontal(ax, axis)
        extent = [*_extent(found), *near[metric][0].values()]
        vertical(ax, min(extent), max(extent), wide(extent))
        titled(ax, heading(metric) + (unit(metric) and f",{unit(metric)}"), direction(metric))
        _response_panel(ax, axis, found, others)
        for height in near[metric][0].values():
            ax.axhline(height, color="#8e8e96", lw=0.8, dashes=(4, 3), zorder=1)
        margin_labels(ax, [(height, clipped(name, 15), SOFT) for name, height in near[metric][0].items()])
        _mark_best(ax, result, axis, metric, found, near[metric][0].values())
    sheet.axes[-1].set_xlabel(
        "edges.sigma: Canny's Gaussian, in pixels" if axis.path == "edges.sigma" else axis.path, labelpad=4
    )
    return sheet.png()


def _response_panel(ax: Axes, axis: Axis, rows: Sequence[Response], others: bool) -> None:
    at = [x for x, _ in _places(axis, rows)]
    seeds = any(len(row.scores) > 1 for row in rows)
    faint = max(0.25, min(0.8, 12 / len(rows)))
    if seeds:
        aside = 0.011 * (ax.get_xlim()[1] - ax.get_xlim()[0])  # beside the whisker, which would hide them
        trials = [place + aside for place, row in zip(at, rows, strict=True) for _ in row.scores]
        ax.scatter(trials, [s for row in rows for s in row.scores], s=10, color=PALE, linewidths=0, zorder=2)
        ax.errorbar(
            at, [row.mean for row in rows], [row.spread for row in rows],
            fmt="none", ecolor=BLUE, elinewidth=1, capsize=2.5, alpha=faint if others else 1, zorder=3,
        )  # fmt: skip
    means = [(axis.position(value), mean) for value, mean in profile(rows)]
    if axis.kind == "places" and others:
        for x, mean in means:
            ax.plot([x - 0.3, x + 0.3], [mean, mean], color=BLUE, lw=1.6, zorder=4)
    elif axis.listed or len(rows) <= FEW:
        for piece in _unbroken(axis, means):
            ax.plot(*zip(*piece, strict=True), color=BLUE, lw=1.6, solid_joinstyle="round", zorder=4)
    alpha = faint if others or not axis.listed else 1
    ax.scatter(at, [row.mean for row in rows], s=22, color=BLUE, linewidths=0, alpha=alpha, zorder=5)


def _places(axis: Axis, rows: Sequence[Response]) -> list[tuple[float, float]]:
    """Where the settings' dots stand; those that share a word stand side by side, spread by the golden ratio."""
    shared = axis.kind == "places" and len(rows) > len({row.value for row in rows})
    aside = [0.4 * ((i * 0.618034) % 1) - 0.2 if shared else 0.0 for i in range(len(rows))]
    return [(axis.position(row.value) + by, row.mean) for row, by in zip(rows, aside, strict=True)]


def _unbroken(axis: Axis, line: list[tuple[float, float]]) -> list[list[tuple[float, float]]]:
    """The line in pieces: words are not joined, nor is 0 to the rest of a logarithmic axis."""
    if axis.kind == "places":
        return []
    gap = axis.broken
    return [line] if gap is None else [piece for piece in (line[:1], line[1:]) if len(piece) > 1]


def _mark_best(
    ax: Axes, result: SweepResult, axis: Axis, metric: str, rows: Sequence[Response], lines: Iterable[float]
) -> None:
    """The winner in its colour, its score where it hides neither means, whiskers nor the baselines' lines."""
    winner = result.best
    places = _places(axis, rows)
    best, x = next(
        (
            (r, x)
            for r, (x, _) in zip(rows, places, strict=True)
            if winner and r.group.setting == winner.setting
        ),
        (None, 0.0),
    )
    if best is None:
        return
    ax.errorbar(
        x, best.mean, best.spread or None, fmt="o", ms=6.5, color=BEST, elinewidth=1.4, capsize=3, zorder=6
    )
    text = f"best: {figure(metric, best.mean)}" if metric == result.metrics[0] else figure(metric, best.mean)
    means = [(axis.position(value), mean) for value, mean in profile(rows)]
    avoid = [
        [(x, r.mean + sign * r.spread) for sign in (-1, 1)] for r, (x, _) in zip(rows, places, strict=True)
    ]
    avoid += [*_unbroken(axis, means), *([(end, height) for end in ax.get_xlim()] for height in lines)]
    label_points(ax, [(x, best.mean, text, BEST)], avoid, size=8.5)


def _extent(rows: Iterable[Response]) -> tuple[float, float]:
    """The lowest and highest of what is drawn: single trials, and the means' deviations."""
    rows = list(rows)
    low = min(min(*row.scores, row.mean - row.spread) for row in rows)
    lowest = min(min(row.scores) for row in rows)
    high = max(max(*row.scores, row.mean + row.spread) for row in rows)
    return (lowest if low <= 0 < lowest else low), high  # a deviation may pass 0 where scores cannot


def _baselines(
    result: SweepResult, metric: str, extent: tuple[float, float]
) -> tuple[dict[str, float], dict[str, float]]:
    """The classical methods' scores within or near the extent, and those too far to be drawn."""
    low, high = extent
    room = 0.35 * (high - low) or 0.05 * abs(high)
    scores = {
        name: s[metric] for name, s in result.baselines.items() if math.isfinite(s.get(metric, math.nan))
    }
    inside = {name: score for name, score in scores.items() if low - room <= score <= high + room}
    return inside, {name: score for name, score in scores.items() if name not in inside}


def _response_note(
    result: SweepResult, axis: Axis, rows: Mapping[str, Sequence[Response]], others: bool
) -> str:
    seeds = max(len(row.scores) for found in rows.values() for row in found)
    parts = []
    if others:
        parts.append(
            "A dark dot is a setting, its mean over the seeds." if seeds > 1 else "A dot is a setting."
        )
        if axis.listed:
            parts.append("The line is their mean at each value.")
        if axis.kind == "places":
            parts.append("Dots stand side by side only to be seen.")
    else:
        parts.append(f"Mean over {seeds} seeds." if seeds > 1 else "One seed a setting: no spread is known.")
    if seeds > 1:
        parts.append(
            "Whiskers: one sample standard deviation either way; beside them, pale, the single trials."
        )
    parts.append(f"{result.photographs} photographs of the split {result.split}.")
    for metric, found in rows.items():
        _, far = _baselines(result, metric, _extent(found))
        if far:
            names = ", ".join(f"{name} {figure(metric, score)}" for name, score in far.items())
            parts.append(f"Outside the picture in {heading(metric)}: {names}.")
        without = len(result.groups) - len(found)
        if without:
            parts.append(f"{how_many(without)} without {heading(metric)} left out.")
    if any(trial.changes for trial in result.trials):
        parts.append("Values are those that trials began with; some were changed during training.")
    return " ".join(parts)
