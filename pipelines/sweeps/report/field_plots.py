"""Plots of a sweep's fields: scores against one field (as EdgeConnect's figure 6 for sigma), and field importance."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from matplotlib.axes import Axes

from pipelines.plots.panels import (
    BLUE,
    MUTED_COLOR,
    PALE_BLUE,
    TEXT_COLOR,
    PanelFigure,
    set_panel_title,
    with_plot_style,
)
from pipelines.sweeps.report.drawing import (
    BEST_COLOR,
    add_margin_labels,
    label_points,
    needs_log_axis,
    set_field_x_axis,
    set_score_y_axis,
    truncate,
    wrap_path,
)
from pipelines.sweeps.report.statistics import (
    Axis,
    ResponsePoint,
    mean_per_value,
    response_points,
    varying_axes,
)
from pipelines.sweeps.report.text import better_direction, format_score, metric_title, metric_unit, pluralize
from pipelines.sweeps.results import SweepResult

MAX_JOINED_SETTINGS = 12  # up to which sampled settings are joined by a line


@with_plot_style
def response_png(result: SweepResult, axis: Axis) -> bytes:
    """The first two metrics against one field: mean and standard deviation over the seeds, and each trial."""
    points = {metric: response_points(result, axis.path, metric) for metric in result.metrics[:2]}
    points = {metric: metric_points for metric, metric_points in points.items() if metric_points}
    has_other_fields = len(varying_axes(result)) > 1
    baselines = {
        metric: _split_baselines(result, metric, _score_range(metric_points))
        for metric, metric_points in points.items()
    }
    figure = PanelFigure(
        [2.15] * len(points),
        _response_note(result, axis, points, has_other_fields),
        right=1.05 if any(inside for inside, _ in baselines.values()) else 0.25,
    )
    for ax, (metric, metric_points) in zip(figure.axes, points.items(), strict=True):
        set_field_x_axis(ax, axis)
        scores = [*_score_range(metric_points), *baselines[metric][0].values()]
        set_score_y_axis(ax, min(scores), max(scores), needs_log_axis(scores))
        set_panel_title(
            ax,
            metric_title(metric) + (metric_unit(metric) and f",{metric_unit(metric)}"),
            better_direction(metric),
        )
        _response_panel(ax, axis, metric_points, has_other_fields)
        for score in baselines[metric][0].values():
            ax.axhline(score, color="#8e8e96", lw=0.8, dashes=(4, 3), zorder=1)
        add_margin_labels(
            ax, [(score, truncate(name, 15), MUTED_COLOR) for name, score in baselines[metric][0].items()]
        )
        _mark_best(ax, result, axis, metric, metric_points, baselines[metric][0].values())
    figure.axes[-1].set_xlabel(
        "edges.sigma: Canny's Gaussian, in pixels" if axis.path == "edges.sigma" else axis.path, labelpad=4
    )
    return figure.to_png()


def _response_panel(ax: Axes, axis: Axis, points: Sequence[ResponsePoint], has_other_fields: bool) -> None:
    xs = [x for x, _ in _dot_positions(axis, points)]
    has_repeats = any(len(point.scores) > 1 for point in points)
    faint = max(0.25, min(0.8, 12 / len(points)))
    if has_repeats:
        offset = 0.011 * (ax.get_xlim()[1] - ax.get_xlim()[0])  # beside the error bar, which would cover them
        trial_xs = [x + offset for x, point in zip(xs, points, strict=True) for _ in point.scores]
        ax.scatter(
            trial_xs,
            [s for point in points for s in point.scores],
            s=10,
            color=PALE_BLUE,
            linewidths=0,
            zorder=2,
        )
        ax.errorbar(
            xs, [point.mean for point in points], [point.std for point in points],
            fmt="none", ecolor=BLUE, elinewidth=1, capsize=2.5, alpha=faint if has_other_fields else 1, zorder=3,
        )  # fmt: skip
    means = [(axis.position(value), mean) for value, mean in mean_per_value(points)]
    if axis.kind == "categorical" and has_other_fields:
        for x, mean in means:
            ax.plot([x - 0.3, x + 0.3], [mean, mean], color=BLUE, lw=1.6, zorder=4)
    elif axis.listed or len(points) <= MAX_JOINED_SETTINGS:
        for piece in _line_pieces(axis, means):
            ax.plot(*zip(*piece, strict=True), color=BLUE, lw=1.6, solid_joinstyle="round", zorder=4)
    alpha = faint if has_other_fields or not axis.listed else 1
    ax.scatter(xs, [point.mean for point in points], s=22, color=BLUE, linewidths=0, alpha=alpha, zorder=5)


def _dot_positions(axis: Axis, points: Sequence[ResponsePoint]) -> list[tuple[float, float]]:
    """(x, mean) of the settings' dots; those of one category are spread in x by the golden ratio."""
    is_shared = axis.kind == "categorical" and len(points) > len({point.value for point in points})
    offsets = [0.4 * ((i * 0.618034) % 1) - 0.2 if is_shared else 0.0 for i in range(len(points))]
    return [
        (axis.position(point.value) + offset, point.mean)
        for point, offset in zip(points, offsets, strict=True)
    ]


def _line_pieces(axis: Axis, line: list[tuple[float, float]]) -> list[list[tuple[float, float]]]:
    """The pieces of a line: categories are not joined, nor is 0 to the rest of a logarithmic axis."""
    if axis.kind == "categorical":
        return []
    gap = axis.break_position
    return [line] if gap is None else [piece for piece in (line[:1], line[1:]) if len(piece) > 1]


def _mark_best(
    ax: Axes,
    result: SweepResult,
    axis: Axis,
    metric: str,
    points: Sequence[ResponsePoint],
    baselines: Iterable[float],
) -> None:
    """Mark the best setting and write its score where it covers no means, error bars or baselines."""
    best_group = result.best_group
    positions = _dot_positions(axis, points)
    best, x = next(
        (
            (r, x)
            for r, (x, _) in zip(points, positions, strict=True)
            if best_group and r.group.setting == best_group.setting
        ),
        (None, 0.0),
    )
    if best is None:
        return
    ax.errorbar(
        x, best.mean, best.std or None, fmt="o", ms=6.5, color=BEST_COLOR, elinewidth=1.4, capsize=3, zorder=6
    )
    text = (
        f"best: {format_score(metric, best.mean)}"
        if metric == result.metrics[0]
        else format_score(metric, best.mean)
    )
    means = [(axis.position(value), mean) for value, mean in mean_per_value(points)]
    avoid = [
        [(x, r.mean + sign * r.std) for sign in (-1, 1)] for r, (x, _) in zip(points, positions, strict=True)
    ]
    avoid += [*_line_pieces(axis, means), *([(end, height) for end in ax.get_xlim()] for height in baselines)]
    label_points(ax, [(x, best.mean, text, BEST_COLOR)], avoid, font_size=8.5)


def _score_range(points: Iterable[ResponsePoint]) -> tuple[float, float]:
    """The lowest and highest score drawn: of trials, and of means ± standard deviation."""
    points = list(points)
    low = min(min(*point.scores, point.mean - point.std) for point in points)
    lowest = min(min(point.scores) for point in points)
    high = max(max(*point.scores, point.mean + point.std) for point in points)
    if low <= 0 < lowest:  # mean - deviation may be negative where scores cannot
        low = lowest
    return low, high


def _split_baselines(
    result: SweepResult, metric: str, score_range: tuple[float, float]
) -> tuple[dict[str, float], dict[str, float]]:
    """The classical methods' scores in or near the range, and those too far away to draw."""
    low, high = score_range
    margin = 0.35 * (high - low) or 0.05 * abs(high)
    scores = {
        name: values[metric]
        for name, values in result.baselines.items()
        if math.isfinite(values.get(metric, math.nan))
    }
    inside = {name: score for name, score in scores.items() if low - margin <= score <= high + margin}
    return inside, {name: score for name, score in scores.items() if name not in inside}


def _response_note(
    result: SweepResult,
    axis: Axis,
    points_by_metric: Mapping[str, Sequence[ResponsePoint]],
    has_other_fields: bool,
) -> str:
    seeds = max(len(point.scores) for points in points_by_metric.values() for point in points)
    sentences = []
    if has_other_fields:
        sentences.append(
            "Each dark dot is a setting's mean over the seeds." if seeds > 1 else "Each dot is a setting."
        )
        if axis.listed:
            sentences.append("The line is the mean over the settings at each value.")
        if axis.kind == "categorical":
            sentences.append("Horizontal offsets within a category only separate the dots.")
    else:
        sentences.append(
            f"Mean over {seeds} seeds." if seeds > 1 else "One seed per setting: no standard deviation."
        )
    if seeds > 1:
        sentences.append("Error bars: ± one sample standard deviation; pale dots: single trials.")
    sentences.append(f"{result.photographs} photographs of the split {result.split}.")
    for metric, points in points_by_metric.items():
        _, distant = _split_baselines(result, metric, _score_range(points))
        if distant:
            distant_names = ", ".join(
                f"{name} {format_score(metric, score)}" for name, score in distant.items()
            )
            sentences.append(f"Out of range in {metric_title(metric)}: {distant_names}.")
        omitted = len(result.groups) - len(points)
        if omitted:
            sentences.append(f"{pluralize(omitted)} without {metric_title(metric)} left out.")
    if any(trial.changes for trial in result.trials):
        sentences.append("Values are the trials' initial ones; some changed during training.")
    return " ".join(sentences)


@with_plot_style
def importance_png(result: SweepResult, importances: Mapping[str, dict[str, float] | str]) -> bytes:
    """Field importance as bars, one panel per metric; a metric without importances gets the reason as text."""
    paths = [axis.path for axis in varying_axes(result)]
    first = next(fractions for fractions in importances.values() if isinstance(fractions, dict))
    paths.sort(key=lambda path: -first[path])
    note = (
        "Fraction of the variance between settings that each field explains by itself (functional ANOVA, random forest); "
        "the rest up to 1 is interactions of fields, and noise."
    )
    names = {path: wrap_path(path, 26) for path in paths}
    name_lines = [name.split("\n") for name in names.values()]
    left = 0.3 + 0.075 * max(len(line) for name in name_lines for line in name)
    height = (0.08 + 0.15 * max(map(len, name_lines))) * len(paths) + 0.1
    figure = PanelFigure([height] * len(importances), note, left=left, right=0.45, below=0.16)
    bar_height = 0.62 / max(map(len, name_lines)) ** 0.5
    for ax, (metric, fractions) in zip(figure.axes, importances.items(), strict=True):
        set_panel_title(ax, metric_title(metric))
        ax.set_xlim(0, 1)
        ax.set_ylim(len(paths) - 0.4, -0.6)
        for side in ("left", "bottom"):
            ax.spines[side].set_visible(False)
        ax.tick_params(length=0)
        ax.set_xticks([])
        ax.set_yticks(range(len(paths)), [names[path] for path in paths], color=TEXT_COLOR)
        if isinstance(fractions, str):
            ax.set_yticks([])
            ax.text(
                0,
                (len(paths) - 1) / 2,
                f"Not shown: {fractions}.",
                va="center",
                fontsize=8,
                color=MUTED_COLOR,
                wrap=True,
            )
            continue
        for y, path in enumerate(paths):
            ax.barh(y, 1, height=bar_height, color="#f3f3f6", zorder=0)
            ax.barh(y, fractions[path], height=bar_height, color=BLUE)
            ax.text(
                fractions[path] + 0.012,
                y,
                f"{fractions[path]:.2f}",
                va="center",
                fontsize=8,
                color=TEXT_COLOR,
            )
    return figure.to_png()
