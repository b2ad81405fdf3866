"""Pictures of a sweep over several fields: all settings side by side, and which field matters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

from matplotlib.patches import PathPatch
from matplotlib.path import Path as Curve

from pipelines.evaluation.metrics import higher_is_better
from pipelines.sweeps.analysis import (
    Axis,
    figure,
    heading,
    how_many,
    round_numbers,
    scored,
    shown,
    varied,
)
from pipelines.sweeps.drawing import (
    BEST,
    BLUE,
    HALO,
    INK,
    SOFT,
    Sheet,
    broken_name,
    clipped,
    shade,
    styled,
    titled,
    wide,
)
from pipelines.sweeps.result import Group, SweepResult


@styled
def parallel_png(result: SweepResult) -> bytes:
    """Every setting as a line through its fields and scores, the better the darker, the best in its own colour."""
    axes, first = varied(result), result.metrics[0]
    groups = [g for g in scored(result, first) if all(axis.path in g.values for axis in axes)]
    metrics = [m for m in result.metrics[:3] if sum(math.isfinite(g.mean(m)) for g in groups) > 1]
    whole = [g for g in groups if all(math.isfinite(g.mean(m)) for m in metrics)]
    note = (
        f"{how_many(len(whole))}, each a line; the darker, the better in {heading(first)}; in colour the best. "
        "Scores have their better end above."
    )
    if len(whole) < len(result.groups):
        note += f" {how_many(len(result.groups) - len(whole))} without a score left out."
    if not whole:
        whole, metrics = groups, [first]
    room = max(7, round(58 / (len(axes) + len(metrics))))  # characters between two axes
    names = [broken_name(name, room) for name in (*(axis.path for axis in axes), *map(heading, metrics))]
    above = 0.35 + 0.14 * max(name.count("\n") + 1 for name in names)
    sheet = Sheet([2.9], note, left=0.55, right=0.5, below=0.12, above=above)
    ax = sheet.axes[0]
    ax.set_axis_off()
    ax.set_xlim(0, len(axes) + len(metrics) - 1)
    ax.set_ylim(-0.04, 1.04)
    columns = [_field_column(axis, whole) for axis in axes] + [_score_column(m, whole) for m in metrics]
    order = list(range(len(whole)))
    for rank in reversed(order):  # the best last, on top
        heights = [places[rank] for places, _ in columns]
        worse = rank / max(1, len(order) - 1)
        colour = BEST if rank == 0 else shade(worse)
        alpha = 1.0 if rank == 0 else max(0.25, min(0.85, 30 / len(order)))
        ax.add_patch(_ribbon(heights, colour, 2.4 if rank == 0 else 1.0, alpha))
    for x, (name, (_, ticks)) in enumerate(zip(names, columns, strict=True)):
        ax.plot([x, x], [0, 1], color="#8e8e96", lw=0.9, zorder=3, clip_on=False)
        score = x >= len(axes)
        ax.text(
            x, 1.08, name, ha="center", va="bottom", fontsize=8.5, linespacing=1.15,
            fontweight="bold" if score else "normal", color=INK,
        )  # fmt: skip
        for height, label in ticks:
            ax.plot([x - 0.012, x + 0.012], [height, height], color="#8e8e96", lw=0.9, zorder=3)
            ax.annotate(
                clipped(label, 10), (x, height), (-4, 0), textcoords="offset points", ha="right", va="center",
                fontsize=7.5, color=SOFT, path_effects=HALO, zorder=5,
            )  # fmt: skip
        if score:
            place = columns[x][0][0]
            ax.annotate(
                figure(metrics[x - len(axes)], whole[0].mean(metrics[x - len(axes)])), (x, place), (5, 0),
                textcoords="offset points", va="center", fontsize=8, fontweight="bold", color=BEST,
                path_effects=HALO, zorder=6,
            )  # fmt: skip
    return sheet.png()


def _field_column(axis: Axis, groups: Sequence[Group]) -> tuple[list[float], list[tuple[float, str]]]:
    """Heights in [0,1] of the settings on one field's axis, and its ticks."""
    low, high = axis.ends
    places = [(axis.position(group.values[axis.path]) - low) / (high - low) for group in groups]
    return places, [((position - low) / (high - low), label) for position, label in axis.ticks]


def _score_column(metric: str, groups: Sequence[Group]) -> tuple[list[float], list[tuple[float, str]]]:
    """As _field_column, the better end above."""
    means = [group.mean(metric) for group in groups]
    log = wide(means)
    scale = [math.log10(mean) for mean in means] if log else means
    low, high = min(scale), max(scale)
    if high == low:
        return [0.5] * len(means), [(0.5, figure(metric, means[0]))]
    up = higher_is_better(metric)

    def height(value: float) -> float:
        share = (value - low) / (high - low)
        return share if up else 1 - share

    ends = [low, high] if log else round_numbers(low, high)
    ticks = [(height(tick), shown(float(f"{10**tick:.3g}") if log else tick)) for tick in ends]
    return [height(s) for s in scale], ticks


def _ribbon(heights: Sequence[float], colour: object, width: float, alpha: float) -> PathPatch:
    points, codes = [(0.0, heights[0])], [Curve.MOVETO]
    for x, (here, there) in enumerate(pairwise(heights)):
        points += [(x + 0.4, here), (x + 0.6, there), (x + 1.0, there)]
        codes += [Curve.CURVE4] * 3
    return PathPatch(
        Curve(points, codes), fill=False, edgecolor=colour, lw=width, alpha=alpha, zorder=4 if width > 2 else 2,
        clip_on=False, capstyle="round",
    )  # fmt: skip


@styled
def importance_png(result: SweepResult, shares: Mapping[str, dict[str, float] | str]) -> bytes:
    """A bar for each field's share of the variance, a panel for each metric; words where there is no such share."""
    paths = [axis.path for axis in varied(result)]
    first = next(found for found in shares.values() if isinstance(found, dict))
    paths.sort(key=lambda path: -first[path])
    note = (
        "Share of the variance between settings that each field explains by itself (functional ANOVA on a random forest); "
        "what is missing to 1 is interplay of fields, and chance."
    )
    names = {path: broken_name(path, 26) for path in paths}
    lines = [name.split("\n") for name in names.values()]
    left = 0.3 + 0.075 * max(len(line) for name in lines for line in name)
    height = (0.08 + 0.15 * max(map(len, lines))) * len(paths) + 0.1
    sheet = Sheet([height] * len(shares), note, left=left, right=0.45, below=0.16)
    bar = 0.62 / max(map(len, lines)) ** 0.5
    for ax, (metric, found) in zip(sheet.axes, shares.items(), strict=True):
        titled(ax, heading(metric))
        ax.set_xlim(0, 1)
        ax.set_ylim(len(paths) - 0.4, -0.6)
        for side in ("left", "bottom"):
            ax.spines[side].set_visible(False)
        ax.tick_params(length=0)
        ax.set_xticks([])
        ax.set_yticks(range(len(paths)), [names[path] for path in paths], color=INK)
        if isinstance(found, str):
            ax.set_yticks([])
            ax.text(
                0,
                (len(paths) - 1) / 2,
                f"Not shown: {found}.",
                va="center",
                fontsize=8,
                color=SOFT,
                wrap=True,
            )
            continue
        for y, path in enumerate(paths):
            ax.barh(y, 1, height=bar, color="#f3f3f6", zorder=0)
            ax.barh(y, found[path], height=bar, color=BLUE)
            ax.text(found[path] + 0.012, y, f"{found[path]:.2f}", va="center", fontsize=8, color=INK)
    return sheet.png()
