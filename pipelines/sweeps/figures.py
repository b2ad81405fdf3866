"""The pictures of a sweep: responses, parallel coordinates, importance, the front of two scores, and the trainings."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes

from pipelines.evaluation.metrics import higher_is_better
from pipelines.evaluation.scores import Evaluation
from pipelines.sweeps.analysis import (
    Axis,
    direction,
    front,
    heading,
    how_many,
    importance,
    response,
    scored,
    shown,
    unit,
    varied,
)
from pipelines.sweeps.drawing import (
    BEST,
    BLUE,
    SOFT,
    Sheet,
    across,
    beside,
    clipped,
    label_points,
    margin_labels,
    shade,
    shades,
    styled,
    titled,
    vertical,
    wide,
)
from pipelines.sweeps.parallel import importance_png, parallel_png
from pipelines.sweeps.response import response_png
from pipelines.sweeps.result import FAILED, FINISHED, STOPPED, Group, SweepResult
from pipelines.sweeps.strips import strips

FEW = 12  # so many settings can be named one by one


@dataclass(frozen=True)
class Picture:
    """A PNG under its file name, with a title and what it shows for those who do not see it."""

    name: str
    title: str
    png: bytes
    shows: str


def sweep_pictures(result: SweepResult, evaluations: Mapping[int, Evaluation]) -> dict[str, bytes]:
    """File name -> PNG, in the report's order: what `pictures` finds to draw."""
    return {picture.name: picture.png for picture in pictures(result, evaluations)}


def pictures(result: SweepResult, evaluations: Mapping[int, Evaluation]) -> list[Picture]:
    """Every picture that the trials give something for; `evaluations` are theirs, by their number.

    A response for each field, strips of completions, the front of the first two metrics, the held-out curves, and with
    several fields parallel coordinates and importance.
    """
    axes, metrics = varied(result), result.metrics[:2]
    shares = {metric: importance(result, metric) for metric in metrics} if len(axes) > 1 else {}
    found: list[Picture] = []
    over = " and ".join(heading(metric) for metric in metrics)
    for axis in axes:
        if any(len(response(result, axis.path, metric)) > 1 for metric in metrics):
            name = f"response-{plain(axis.path)}.png"
            found.append(
                Picture(
                    name,
                    f"{over} over {axis.path}",
                    response_png(result, axis),
                    f"{over} against {axis.path}",
                )
            )
    found += [Picture(*strip) for strip in strips(result, evaluations)]
    if len(axes) > 1:
        if len(scored(result, metrics[0])) > 1:
            shows = "every setting as a line through its fields and scores"
            found.append(Picture("parallel.png", "All settings", parallel_png(result), shows))
        if any(isinstance(share, dict) for share in shares.values()):
            shows = "the share of the differences between settings that each field explains by itself"
            found.append(
                Picture("importance.png", "Which field matters", importance_png(result, shares), shows)
            )
    if len(metrics) > 1 and len(_pairs(result)) > 1:
        shows = f"settings by {over}, with those that no other beats in both"
        found.append(Picture("front.png", f"{over}: what is to be had together", front_png(result), shows))
    if any(_finite(trial.curve) for trial in result.trials):
        shows = "PSNR in held-out holes over the steps of every trial"
        found.append(
            Picture("training.png", "The trainings", training_png(result, _leading(axes, shares)), shows)
        )
    return found


def plain(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name)


def _pairs(result: SweepResult) -> list[Group]:
    """The settings that have both of the first two metrics."""
    return [g for g in result.groups if all(math.isfinite(g.mean(m)) for m in result.metrics[:2])]


@styled
def front_png(result: SweepResult) -> bytes:
    """The first metric over the second, a dot a setting; those that no other beats in both are joined."""
    up, along = metrics = result.metrics[:2]
    groups, axes = _pairs(result), varied(result)
    joined = sorted(front(result), key=lambda group: group.mean(along))
    settings = {group.setting for group in joined}
    spread = len(groups) <= FEW and any(len(group.trials) > 1 for group in groups)
    sheet = Sheet([3.3], _front_note(result, groups, axes, spread), right=0.35)
    (ax,) = sheet.axes
    ends = {m: [g.mean(m) + k * g.spread(m) * spread for g in groups for k in (-1, 1)] for m in metrics}
    vertical(ax, min(ends[up]), max(ends[up]), wide(ends[up]))
    across(ax, min(ends[along]), max(ends[along]), wide(ends[along]))
    titled(ax, f"{heading(up)}{unit(up) and ',' + unit(up)}", direction(up))
    ax.set_xlabel(f"{heading(along)} ({direction(along)})", labelpad=4)
    avoid = []
    for group in groups:
        x, y, on = group.mean(along), group.mean(up), group.setting in settings
        if spread:
            colour = BLUE if on else SOFT
            ax.errorbar(
                x,
                y,
                group.spread(up),
                group.spread(along),
                fmt="none",
                ecolor=colour,
                elinewidth=0.8,
                alpha=0.6,
            )
            avoid.append([(x - group.spread(along), y), (x + group.spread(along), y)])
        avoid.append([(x, y - group.spread(up) * spread), (x, y + group.spread(up) * spread)])
        if not on:
            alpha = max(0.35, min(1.0, 40 / len(groups)))
            ax.scatter(x, y, s=20, color="#9a9aa4", linewidths=0, alpha=alpha, zorder=3)
    stairs = (
        "steps-pre" if higher_is_better(along) else "steps-post"
    )  # of two neighbours, what the better gives
    x_y = [(group.mean(along), group.mean(up)) for group in joined]
    ax.plot(*zip(*x_y, strict=True), "-o", color=BLUE, ms=5, lw=1.3, drawstyle=stairs, zorder=4)
    for a, b in pairwise(x_y):
        avoid.append([a, (a[0], b[1]) if higher_is_better(along) else (b[0], a[1]), b])
    few = (
        len(groups) <= FEW and len(axes) == 1
    )  # of labels of many words only the front's ends, and one between
    chosen = [*joined, *groups] if few else [joined[0], joined[-1], joined[len(joined) // 2]]
    best = next((group for group in groups if result.best and group.setting == result.best.setting), None)
    labels = []
    for setting, group in {g.setting: g for g in [*([best] if best else []), *chosen]}.items():
        text, colour = _short(group, axes), BLUE if setting in settings else SOFT
        if best and setting == best.setting:
            text, colour = f"best: {text}", BEST
            ax.plot(group.mean(along), group.mean(up), "o", ms=7.5, color=BEST, zorder=5)
        labels.append((group.mean(along), group.mean(up), text, colour))
    label_points(ax, labels, avoid)
    return sheet.png()


def _front_note(result: SweepResult, groups: Sequence[Group], axes: Sequence[Axis], spread: bool) -> str:
    up, along = result.metrics[:2]
    corner = (
        f"{'upper' if higher_is_better(up) else 'lower'} {'right' if higher_is_better(along) else 'left'}"
    )
    note = f"Better is to the {corner}. On the line: settings that no other beats in both."
    if spread:
        note += " Whiskers: one sample standard deviation over the seeds."
    if len(groups) < len(result.groups):
        note += f" {how_many(len(result.groups) - len(groups))} without both scores left out."
    return note + (f" Labels: {', '.join(axis.path for axis in axes)}." if axes else "")


def _short(group: Group, axes: Sequence[Axis]) -> str:
    """A setting's bare values."""
    return clipped(", ".join(shown(group.values[axis.path]) for axis in axes) or "the recipe as it is", 38)


@styled
def training_png(result: SweepResult, axis: Axis | None) -> bytes:
    """PSNR in held-out holes over steps, a line a trial, coloured by one field."""
    curves = {trial.number: _finite(trial.curve) for trial in result.trials}
    colours = shades(axis) if axis else {}
    few = axis is not None and len(axis.values) <= 9
    kinds = {trial.state for trial in result.trials if curves[trial.number]}
    ends = {STOPPED: ("|", "stopped by the scheduler"), FAILED: ("x", "failed")}
    note = "Each line is a trial, at its checkpoints."
    note += "".join(
        f" {'Bar' if m == '|' else 'Cross'} at the end: {words}."
        for s, (m, words) in ends.items()
        if s in kinds
    )
    silent = sum(not curve for curve in curves.values())
    if silent:
        note += f" {silent} of {len(curves)} trials ended before their first score."
    sheet = Sheet([2.6], note, right=1.0 if axis else 0.25)
    ax = sheet.axes[0]
    points = [point for curve in curves.values() for point in curve]
    scores, steps = [score for _, score in points], [step for step, _ in points]
    vertical(ax, min(scores), max(scores), False)
    room = 0.02 * (max(steps) - min(steps)) or 1.0
    ax.set_xlim(min(steps) - room, max(steps) + room)
    titled(ax, "PSNR in held-out holes, dB", direction("psnr"))
    ax.set_xlabel("steps", labelpad=4)
    alpha = max(0.3, min(0.9, 20 / len(curves)))
    for trial in result.trials:
        curve = curves[trial.number]
        if not curve:
            continue
        colour = colours[trial.values[axis.path]] if axis else BLUE
        ax.plot(*zip(*curve, strict=True), color=colour, lw=1.0, alpha=alpha, zorder=2)
        if trial.state != FINISHED:
            ax.plot(*curve[-1], ends[trial.state][0], color=colour, ms=5, mew=1.4, zorder=3)
        elif len(curve) == 1:
            ax.plot(*curve[-1], "o", color=colour, ms=3, zorder=3)
    if axis and few:
        last = {value: [] for value in axis.values}  # type: dict[object, list[float]]
        for trial in result.trials:
            if curves[trial.number]:
                last[trial.values[axis.path]].append(curves[trial.number][-1][1])
        labels = [
            (float(np.mean(found)), clipped(shown(v), 13), colours[v]) for v, found in last.items() if found
        ]
        margin_labels(ax, labels, lead=False)
        beside(ax, axis.path)
    elif axis:
        _scale(ax, axis)
    return sheet.png()


def _scale(ax: Axes, axis: Axis) -> None:
    """What the colours mean, as a strip right of the panel."""
    low, high = axis.ends
    strip = ax.inset_axes((1.04, 0.0, 0.025, 1.0))
    colours = np.array([[shade(place)] for place in np.linspace(0, 1, 64)])
    strip.imshow(colours, aspect="auto", origin="lower", extent=(0, 1, 0, 1))
    strip.set_xticks([])
    ticks = [(place - low) / (high - low) for place, _ in axis.ticks]
    strip.set_yticks(ticks, [label for _, label in axis.ticks], fontsize=7.5)
    strip.yaxis.tick_right()
    strip.tick_params(length=2)
    beside(ax, axis.path)


def _leading(axes: Sequence[Axis], shares: Mapping[str, dict[str, float] | str]) -> Axis | None:
    """The field that explains most of the first metric; where that cannot be said, the first one."""
    first = next(iter(shares.values()), "")
    if isinstance(first, dict):
        return max(axes, key=lambda axis: first[axis.path])
    return axes[0] if axes else None


def _finite(curve: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    return [(step, score) for step, score in curve if math.isfinite(score)]
