"""Plots of a sweep's settings: parallel coordinates, the Pareto front of two metrics, and the training curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Curve

from pipelines.evaluation.metrics import higher_is_better
from pipelines.plots.panels import (
    BLUE,
    MUTED_COLOR,
    TEXT_COLOR,
    PanelFigure,
    set_panel_title,
    with_plot_style,
)
from pipelines.sweeps.report.drawing import (
    BEST_COLOR,
    HALO,
    add_margin_labels,
    add_margin_title,
    label_points,
    needs_log_axis,
    sequential_color,
    set_score_x_axis,
    set_score_y_axis,
    truncate,
    value_colors,
    wrap_path,
)
from pipelines.sweeps.report.statistics import (
    Axis,
    format_value,
    round_numbers,
    scored_groups,
    two_metric_front,
    varying_axes,
)
from pipelines.sweeps.report.text import better_direction, format_score, metric_title, metric_unit, pluralize
from pipelines.sweeps.results import FAILED, FINISHED, STOPPED, SweepResult, TrialGroup


@with_plot_style
def parallel_png(result: SweepResult) -> bytes:
    """Parallel coordinates: each setting is a line through its values and scores; better is darker, the best is coloured."""
    axes, first = varying_axes(result), result.metrics[0]
    groups = [g for g in scored_groups(result, first) if all(axis.path in g.values for axis in axes)]
    metrics = [m for m in result.metrics[:3] if sum(math.isfinite(g.mean(m)) for g in groups) > 1]
    drawn = [g for g in groups if all(math.isfinite(g.mean(m)) for m in metrics)]
    note = (
        f"{pluralize(len(drawn))}, one line each; darker is better in {metric_title(first)}; the best is vermilion. "
        "Better scores are higher."
    )
    if len(drawn) < len(result.groups):
        note += f" {pluralize(len(result.groups) - len(drawn))} without a score left out."
    if not drawn:
        drawn, metrics = groups, [first]
    max_chars = max(7, round(58 / (len(axes) + len(metrics))))  # characters that fit between two axes
    names = [
        wrap_path(name, max_chars) for name in (*(axis.path for axis in axes), *map(metric_title, metrics))
    ]
    above = 0.35 + 0.14 * max(name.count("\n") + 1 for name in names)
    figure = PanelFigure([2.9], note, left=0.55, right=0.5, below=0.12, above=above)
    ax = figure.axes[0]
    ax.set_axis_off()
    ax.set_xlim(0, len(axes) + len(metrics) - 1)
    ax.set_ylim(-0.04, 1.04)
    columns = [_field_column(axis, drawn) for axis in axes] + [_score_column(m, drawn) for m in metrics]
    ranks = list(range(len(drawn)))
    for rank in reversed(ranks):  # the best last, on top
        heights = [heights_of_column[rank] for heights_of_column, _ in columns]
        position = rank / max(1, len(ranks) - 1)
        color = BEST_COLOR if rank == 0 else sequential_color(position)
        alpha = 1.0 if rank == 0 else max(0.25, min(0.85, 30 / len(ranks)))
        ax.add_patch(_setting_curve(heights, color, 2.4 if rank == 0 else 1.0, alpha))
    for x, (name, (_, ticks)) in enumerate(zip(names, columns, strict=True)):
        ax.plot([x, x], [0, 1], color="#8e8e96", lw=0.9, zorder=3, clip_on=False)
        is_score = x >= len(axes)
        ax.text(
            x, 1.08, name, ha="center", va="bottom", fontsize=8.5, linespacing=1.15,
            fontweight="bold" if is_score else "normal", color=TEXT_COLOR,
        )  # fmt: skip
        for height, label in ticks:
            ax.plot([x - 0.012, x + 0.012], [height, height], color="#8e8e96", lw=0.9, zorder=3)
            ax.annotate(
                truncate(label, 10), (x, height), (-4, 0), textcoords="offset points", ha="right", va="center",
                fontsize=7.5, color=MUTED_COLOR, path_effects=HALO, zorder=5,
            )  # fmt: skip
        if is_score:
            best_height = columns[x][0][0]
            ax.annotate(
                format_score(metrics[x - len(axes)], drawn[0].mean(metrics[x - len(axes)])), (x, best_height), (5, 0),
                textcoords="offset points", va="center", fontsize=8, fontweight="bold", color=BEST_COLOR,
                path_effects=HALO, zorder=6,
            )  # fmt: skip
    return figure.to_png()


def _field_column(axis: Axis, groups: Sequence[TrialGroup]) -> tuple[list[float], list[tuple[float, str]]]:
    """The settings' heights in [0,1] on one field's axis, and its ticks (height, label)."""
    low, high = axis.ends
    heights = [(axis.position(group.values[axis.path]) - low) / (high - low) for group in groups]
    return heights, [((position - low) / (high - low), label) for position, label in axis.ticks]


def _score_column(metric: str, groups: Sequence[TrialGroup]) -> tuple[list[float], list[tuple[float, str]]]:
    """As _field_column, for a metric: better scores are higher."""
    means = [group.mean(metric) for group in groups]
    is_log = needs_log_axis(means)
    scaled = [math.log10(mean) for mean in means] if is_log else means
    low, high = min(scaled), max(scaled)
    if high == low:
        return [0.5] * len(means), [(0.5, format_score(metric, means[0]))]
    higher_is_up = higher_is_better(metric)

    def height(value: float) -> float:
        fraction = (value - low) / (high - low)
        return fraction if higher_is_up else 1 - fraction

    ends = [low, high] if is_log else round_numbers(low, high)
    ticks = [(height(tick), format_value(float(f"{10**tick:.3g}") if is_log else tick)) for tick in ends]
    return [height(value) for value in scaled], ticks


def _setting_curve(heights: Sequence[float], color: object, width: float, alpha: float) -> PathPatch:
    points, codes = [(0.0, heights[0])], [Curve.MOVETO]
    for x, (left, right) in enumerate(pairwise(heights)):
        points += [(x + 0.4, left), (x + 0.6, right), (x + 1.0, right)]
        codes += [Curve.CURVE4] * 3
    return PathPatch(
        Curve(points, codes), fill=False, edgecolor=color, lw=width, alpha=alpha, zorder=4 if width > 2 else 2,
        clip_on=False, capstyle="round",
    )  # fmt: skip


MAX_LABELED_SETTINGS = 12  # up to which each setting gets its own label


def groups_with_two_scores(result: SweepResult) -> list[TrialGroup]:
    """The groups with finite means of both of the first two metrics."""
    return [g for g in result.groups if all(math.isfinite(g.mean(m)) for m in result.metrics[:2])]


@with_plot_style
def pareto_png(result: SweepResult) -> bytes:
    """The first metric against the second, one dot per setting; the Pareto front is joined by steps."""
    y_metric, x_metric = metrics = result.metrics[:2]
    groups, axes = groups_with_two_scores(result), varying_axes(result)
    front = sorted(two_metric_front(result), key=lambda group: group.mean(x_metric))
    front_settings = {group.setting for group in front}
    with_error_bars = len(groups) <= MAX_LABELED_SETTINGS and any(len(group.trials) > 1 for group in groups)
    figure = PanelFigure([3.3], _pareto_note(result, groups, axes, with_error_bars), right=0.35)
    (ax,) = figure.axes
    extents = {
        metric: [g.mean(metric) + k * g.std(metric) * with_error_bars for g in groups for k in (-1, 1)]
        for metric in metrics
    }
    set_score_y_axis(ax, min(extents[y_metric]), max(extents[y_metric]), needs_log_axis(extents[y_metric]))
    set_score_x_axis(ax, min(extents[x_metric]), max(extents[x_metric]), needs_log_axis(extents[x_metric]))
    set_panel_title(
        ax,
        f"{metric_title(y_metric)}{metric_unit(y_metric) and ',' + metric_unit(y_metric)}",
        better_direction(y_metric),
    )
    ax.set_xlabel(f"{metric_title(x_metric)} ({better_direction(x_metric)})", labelpad=4)
    avoid = []
    for group in groups:
        x, y, in_front = group.mean(x_metric), group.mean(y_metric), group.setting in front_settings
        if with_error_bars:
            color = BLUE if in_front else MUTED_COLOR
            ax.errorbar(
                x,
                y,
                group.std(y_metric),
                group.std(x_metric),
                fmt="none",
                ecolor=color,
                elinewidth=0.8,
                alpha=0.6,
            )
            avoid.append([(x - group.std(x_metric), y), (x + group.std(x_metric), y)])
        avoid.append(
            [(x, y - group.std(y_metric) * with_error_bars), (x, y + group.std(y_metric) * with_error_bars)]
        )
        if not in_front:
            alpha = max(0.35, min(1.0, 40 / len(groups)))
            ax.scatter(x, y, s=20, color="#9a9aa4", linewidths=0, alpha=alpha, zorder=3)
    # between two points: the y of the one with the better x
    drawstyle = "steps-pre" if higher_is_better(x_metric) else "steps-post"
    front_points = [(group.mean(x_metric), group.mean(y_metric)) for group in front]
    ax.plot(*zip(*front_points, strict=True), "-o", color=BLUE, ms=5, lw=1.3, drawstyle=drawstyle, zorder=4)
    for a, b in pairwise(front_points):
        avoid.append([a, (a[0], b[1]) if higher_is_better(x_metric) else (b[0], a[1]), b])
    # otherwise only the front's ends and middle, as labels of several fields are long
    label_all = len(groups) <= MAX_LABELED_SETTINGS and len(axes) == 1
    labeled = [*front, *groups] if label_all else [front[0], front[-1], front[len(front) // 2]]
    best = next(
        (group for group in groups if result.best_group and group.setting == result.best_group.setting), None
    )
    labels = []
    for setting, group in {g.setting: g for g in [*([best] if best else []), *labeled]}.items():
        text, color = _short_label(group, axes), BLUE if setting in front_settings else MUTED_COLOR
        if best and setting == best.setting:
            text, color = f"best: {text}", BEST_COLOR
            ax.plot(group.mean(x_metric), group.mean(y_metric), "o", ms=7.5, color=BEST_COLOR, zorder=5)
        labels.append((group.mean(x_metric), group.mean(y_metric), text, color))
    label_points(ax, labels, avoid)
    return figure.to_png()


def _pareto_note(
    result: SweepResult, groups: Sequence[TrialGroup], axes: Sequence[Axis], with_error_bars: bool
) -> str:
    y_metric, x_metric = result.metrics[:2]
    corner = f"{'upper' if higher_is_better(y_metric) else 'lower'} {'right' if higher_is_better(x_metric) else 'left'}"
    note = f"Better is to the {corner}. The line is the Pareto front: no other setting is better in both."
    if with_error_bars:
        note += " Error bars: ± one sample standard deviation over the seeds."
    if len(groups) < len(result.groups):
        note += f" {pluralize(len(result.groups) - len(groups))} without both scores left out."
    return note + (f" Labels: {', '.join(axis.path for axis in axes)}." if axes else "")


def _short_label(group: TrialGroup, axes: Sequence[Axis]) -> str:
    """A setting's values without the fields' names."""
    return truncate(
        ", ".join(format_value(group.values[axis.path]) for axis in axes) or "the recipe as it is", 38
    )


@with_plot_style
def training_png(result: SweepResult, axis: Axis | None) -> bytes:
    """Validation PSNR in the holes against steps, one line per trial, coloured by one field."""
    curves = {trial.number: finite_points(trial.curve) for trial in result.trials}
    colors = value_colors(axis) if axis else {}
    has_legend = axis is not None and len(axis.values) <= 9
    states = {trial.state for trial in result.trials if curves[trial.number]}
    end_marks = {STOPPED: ("|", "stopped by the scheduler"), FAILED: ("x", "failed")}
    note = "Each line is a trial; scores at its checkpoints."
    note += "".join(
        f" {'Bar' if m == '|' else 'Cross'} at the end: {words}."
        for s, (m, words) in end_marks.items()
        if s in states
    )
    without_scores = sum(not curve for curve in curves.values())
    if without_scores:
        note += f" {without_scores} of {len(curves)} trials ended before their first score."
    figure = PanelFigure([2.6], note, right=1.0 if axis else 0.25)
    ax = figure.axes[0]
    points = [point for curve in curves.values() for point in curve]
    scores, steps = [score for _, score in points], [step for step, _ in points]
    set_score_y_axis(ax, min(scores), max(scores), False)
    margin = 0.02 * (max(steps) - min(steps)) or 1.0
    ax.set_xlim(min(steps) - margin, max(steps) + margin)
    set_panel_title(ax, "Validation PSNR in the holes, dB", better_direction("psnr"))
    ax.set_xlabel("steps", labelpad=4)
    alpha = max(0.3, min(0.9, 20 / len(curves)))
    for trial in result.trials:
        curve = curves[trial.number]
        if not curve:
            continue
        color = colors[trial.values[axis.path]] if axis else BLUE
        ax.plot(*zip(*curve, strict=True), color=color, lw=1.0, alpha=alpha, zorder=2)
        if trial.state != FINISHED:
            ax.plot(*curve[-1], end_marks[trial.state][0], color=color, ms=5, mew=1.4, zorder=3)
        elif len(curve) == 1:
            ax.plot(*curve[-1], "o", color=color, ms=3, zorder=3)
    if axis and has_legend:
        last_scores = {value: [] for value in axis.values}  # type: dict[object, list[float]]
        for trial in result.trials:
            if curves[trial.number]:
                last_scores[trial.values[axis.path]].append(curves[trial.number][-1][1])
        labels = [
            (float(np.mean(value_scores)), truncate(format_value(v), 13), colors[v])
            for v, value_scores in last_scores.items()
            if value_scores
        ]
        add_margin_labels(ax, labels, leader_lines=False)
        add_margin_title(ax, axis.path)
    elif axis:
        _draw_color_scale(ax, axis)
    return figure.to_png()


def _draw_color_scale(ax: Axes, axis: Axis) -> None:
    """Draw the colour scale right of the panel."""
    low, high = axis.ends
    strip = ax.inset_axes((1.04, 0.0, 0.025, 1.0))
    colors = np.array([[sequential_color(position)] for position in np.linspace(0, 1, 64)])
    strip.imshow(colors, aspect="auto", origin="lower", extent=(0, 1, 0, 1))
    strip.set_xticks([])
    ticks = [(position - low) / (high - low) for position, _ in axis.ticks]
    strip.set_yticks(ticks, [label for _, label in axis.ticks], fontsize=7.5)
    strip.yaxis.tick_right()
    strip.tick_params(length=2)
    add_margin_title(ax, axis.path)


def finite_points(curve: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    return [(step, score) for step, score in curve if math.isfinite(score)]
