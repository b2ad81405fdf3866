"""Drawing helpers for a sweep's plots: axes, colours and labels that do not overlap."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullLocator

from pipelines.plots.panels import DPI, LINE_COLOR, MUTED_COLOR
from pipelines.sweeps.report.statistics import Axis, format_value

BEST_COLOR = "#d55e00"  # vermilion: distinct from the blue for every kind of colour vision
CATEGORY_COLORS = (
    "#0072b2",
    "#e69f00",
    "#009e73",
    "#cc79a7",
    "#56b4e9",
    "#d55e00",
    "#000000",
)
"""The palette of Okabe and Ito."""
MIN_LOG_RATIO = 30  # of largest to smallest score, for a logarithmic axis

HALO = [patheffects.withStroke(linewidth=2.5, foreground="white")]


def set_field_x_axis(ax: Axes, axis: Axis) -> None:
    """Set the x axis of a field: limits, ticks, and the break between 0 and the rest of a logarithmic axis."""
    low, high = axis.ends
    margin = 0.5 if axis.kind == "categorical" else 0.05 * (high - low)
    ax.set_xlim(low - margin, high + margin)
    labels = [label for _, label in axis.ticks]
    ax.xaxis.set_major_locator(FixedLocator([position for position, _ in axis.ticks]))
    is_long = sum(map(len, labels)) > 52
    ax.set_xticklabels(
        [truncate(label, 16) for label in labels],
        rotation=30 if is_long else 0,
        ha="right" if is_long else "center",
    )
    ax.tick_params(axis="x", length=3)
    if axis.break_position is not None:
        half_gap = 0.008 * (high - low)
        axis_transform = ax.get_xaxis_transform()
        ax.plot(
            [axis.break_position - half_gap, axis.break_position + half_gap],
            [0, 0],
            color="white",
            lw=2,
            transform=axis_transform,
            clip_on=False,
        )
        for position in (axis.break_position - half_gap, axis.break_position + half_gap):
            x = [position - half_gap, position + half_gap]
            ax.plot(x, [-0.02, 0.02], color=MUTED_COLOR, lw=0.8, transform=axis_transform, clip_on=False)


def set_score_y_axis(ax: Axes, low: float, high: float, is_log: bool) -> None:
    """Set the y axis of a score, with margins for labels and faint grid lines."""
    _set_score_axis(ax, "y", low, high, is_log)
    ax.grid(axis="y", color=LINE_COLOR, lw=0.8)
    ax.set_axisbelow(True)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)


def set_score_x_axis(ax: Axes, low: float, high: float, is_log: bool) -> None:
    """Set the x axis of a score."""
    _set_score_axis(ax, "x", low, high, is_log)
    ax.tick_params(axis="x", length=3)


def _set_score_axis(ax: Axes, direction: Literal["x", "y"], low: float, high: float, is_log: bool) -> None:
    axis = ax.xaxis if direction == "x" else ax.yaxis
    if not is_log:
        margin = 0.14 * (high - low) or 0.02 * abs(high) or 1.0
        ax.set(**{f"{direction}lim": (low - margin, high + margin)})
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        return
    margin = (high / low) ** 0.14
    ax.set(**{f"{direction}scale": "log", f"{direction}lim": (low / margin, high * margin)})
    axis.set_major_locator(LogLocator(subs=(1.0, 3.0) if high / low < 300 else (1.0,)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: format_value(float(value)))


def add_margin_title(ax: Axes, name: str) -> None:
    """Write the field's name above the labels in the right margin."""
    ax.annotate(
        wrap_path(name, 15), (1.03, 1), (0, 8), xycoords="axes fraction", textcoords="offset points",
        fontsize=7.5, color=MUTED_COLOR, annotation_clip=False,
    )  # fmt: skip


def needs_log_axis(values: Sequence[float]) -> bool:
    """Whether scores need a logarithmic axis."""
    return min(values) > 0 and max(values) / min(values) >= MIN_LOG_RATIO


def sequential_color(position: float) -> tuple[float, float, float]:
    """The RGB colour of a position in [0,1]: viridis from violet to green, without the yellow that is faint on white."""
    red, green, blue, _ = matplotlib.colormaps["viridis"](0.86 * position)
    return red, green, blue


def value_colors(axis: Axis) -> dict[Any, Any]:
    """A colour per value of a field: from one scale for numbers, distinct colours for categories."""
    if axis.kind == "categorical":
        return {value: CATEGORY_COLORS[i % len(CATEGORY_COLORS)] for i, value in enumerate(axis.values)}
    low, high = axis.ends
    return {value: sequential_color((axis.position(value) - low) / (high - low)) for value in axis.values}


def separate(positions: Sequence[float], min_gap: float, low: float, high: float) -> list[float]:
    """Positions at least `min_gap` apart, in the same order and as close to `positions` as possible.

    They stay within low and high if there is space. Neighbours that would overlap are spaced evenly around their mean.
    """
    order = np.argsort(positions, kind="stable")
    runs: list[list[float]] = []  # (centre, members) of labels that touch each other
    for index in order:
        runs.append([positions[index], 1])
        while len(runs) > 1 and runs[-1][0] - runs[-2][0] < min_gap * (runs[-1][1] + runs[-2][1]) / 2:
            centre, count = runs.pop()
            previous_centre, previous_count = runs[-1]
            runs[-1] = [
                (centre * count + previous_centre * previous_count) / (count + previous_count),
                count + previous_count,
            ]
    placed = [centre + min_gap * (i - (count - 1) / 2) for centre, count in runs for i in range(round(count))]
    for i in range(len(placed)):  # up from the lower end, then down from the upper one
        placed[i] = max(placed[i], low if i == 0 else placed[i - 1] + min_gap)
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], high if i == len(placed) - 1 else placed[i + 1] - min_gap)
    separated = [0.0] * len(placed)
    for index, position in zip(order, placed, strict=True):
        separated[int(index)] = position
    return separated


def add_margin_labels(ax: Axes, labels: Sequence[tuple[float, str, Any]], leader_lines: bool = True) -> None:
    """Write labels (y, text, colour) right of a panel, moved apart where they would overlap; leader_lines: to their y."""
    if not labels:
        return
    to_axes = ax.transData + ax.transAxes.inverted()
    x = ax.get_xlim()[1]
    heights = [float(to_axes.transform((x, height))[1]) for height, *_ in labels]
    inches = ax.get_position().height * ax.figure.get_figheight()  # type: ignore[union-attr]
    for (_, text, color), height, label_height in zip(
        labels, heights, separate(heights, 0.14 / inches, 0.0, 1.0), strict=True
    ):
        if leader_lines:
            ax.plot(
                [1.0, 1.02],
                [height, label_height],
                color="#c9c9cf",
                lw=0.6,
                transform=ax.transAxes,
                clip_on=False,
            )
        ax.text(
            1.03,
            label_height,
            text,
            transform=ax.transAxes,
            va="center",
            fontsize=7.5,
            color=color,
            clip_on=False,
        )


def label_points(
    ax: Axes,
    points: Sequence[tuple[float, float, str, Any]],
    avoid: Sequence[Sequence[tuple[float, float]]] = (),
    font_size: float = 7.5,
) -> None:
    """Write labels (x, y, text, colour) beside their points, where they cover the least of points and of lines `avoid`."""
    pixels = [ax.transData.transform((x, y)) for x, y, *_ in points]
    frame = ax.get_window_extent()
    occupied: list[Box] = [(x - 9, y - 9, x + 9, y + 9) for x, y in pixels]
    occupied += [box for line in avoid for box in _line_boxes(ax.transData.transform(line))]
    for (_, _, text, color), (x, y) in zip(points, pixels, strict=True):
        width, height = 0.64 * font_size / 72 * DPI * len(text), 1.25 * font_size / 72 * DPI

        def cost(box: Box) -> float:
            covered = sum(_overlap_area(box, other) for other in occupied)
            outside = (frame.x0 - box[0], frame.y0 - box[1], box[2] - frame.x1, box[3] - frame.y1)
            return covered + 100 * sum(max(0.0, distance) for distance in outside)

        candidates = []
        for preference, (distance, octant) in enumerate(
            (distance, octant) for distance in (14, 26, 40) for octant in range(8)
        ):
            dx, dy = math.cos(octant * math.pi / 4), math.sin(octant * math.pi / 4)
            left, bottom = (
                x + dx * distance - width * (1 - dx) / 2,
                y + dy * (distance + height / 2) - height / 2,
            )
            box = (left, bottom, left + width, bottom + height)
            candidates.append((cost(box) + 3 * preference, box))
        box = min(candidates)[1]
        occupied.append(box)
        centre, middle = ax.transData.inverted().transform(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2))
        ax.text(
            centre, middle, text, fontsize=font_size, fontweight="bold" if color == BEST_COLOR else "normal", color=color,
            ha="center", va="center", path_effects=HALO, zorder=8,
        )  # fmt: skip


Box = tuple[float, float, float, float]
"""(left, bottom, right, top) in pixels."""


def _line_boxes(line: np.ndarray) -> list[Box]:
    """Small boxes that cover a line, [n,2] in pixels."""
    boxes = []
    for (x0, y0), (x1, y1) in pairwise(line.tolist()):
        count = max(1, round(math.hypot(x1 - x0, y1 - y0) / 6))
        steps = [(x0 + (x1 - x0) * i / count, y0 + (y1 - y0) * i / count) for i in range(count + 1)]
        boxes += [(x - 3, y - 3, x + 3, y + 3) for x, y in steps]
    return boxes


def _overlap_area(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def truncate(text: str, max_chars: int) -> str:
    return text if len(text) <= max_chars else text[: max_chars - 1] + "…"


def wrap_path(path: str, width: int) -> str:
    """A recipe path in lines of about `width` characters, broken after dots, and after underscores if necessary."""
    lines = [""]
    for part in path.replace(".", ".\0").split("\0"):
        pieces = [part] if len(part) <= width else part.replace("_", "_\0").split("\0")
        for piece in pieces:
            if lines[-1] and len(lines[-1] + piece) > width:
                lines.append("")
            lines[-1] += piece
    return "\n".join(lines)
