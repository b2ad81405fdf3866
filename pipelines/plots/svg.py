"""Line charts and the graph of steps as SVG: small, sharp at any width, styled by the page's CSS."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from markupsafe import Markup, escape

from pipelines.durations import format_duration

WIDTH, HEIGHT = 320, 168
LEFT, RIGHT, TOP, BOTTOM = 44, 8, 14, 22
LABEL_CHAR_WIDTH, LABEL_ROW = (
    5.9,
    12,
)  # upper bound of a label's width per character; height of a row of labels
MAX_POINTS = 120
NODE_WIDTH, NODE_HEIGHT, COLUMN_GAP, ROW_GAP = 164, 50, 44, 18

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class StepNode:
    """One step of a run: name, upstream steps, wall-clock seconds (None: not run), state, kind and subject."""

    name: str
    needs: tuple[str, ...] = ()
    seconds: float | None = None
    state: str = "finished"
    key: str = ""
    kind: str = ""
    subject: str = ""
    """'' if it is the only step of its kind. Without a kind, the name is shown."""


def curve_svg(title: str, points: Points, phases: Sequence[tuple[float, str]] = ()) -> Markup:
    """One metric over steps: a line through the means of neighbouring points, over a faint band of their range.

    phases: (first step, name), marked by dotted lines; names that would overlap are in rows above each other. The axis
    is logarithmic if all values are positive and span more than a factor of 100. Points that are not finite are left
    out; with fewer than two there is no chart.
    """
    finite = [(float(x), float(y)) for x, y in points if math.isfinite(y)]
    if len(finite) < 2:
        return Markup("")
    bins = _downsample(sorted(finite))
    low, high = min(b[1] for b in bins), max(b[3] for b in bins)
    log = low > 0 and high / low > 100
    scale = math.log10 if log else float
    bottom, top = _axis_range(scale(low), scale(high))
    first, last = bins[0][0], bins[-1][0]

    def x(step: float) -> float:
        return LEFT + (step - first) / ((last - first) or 1) * (WIDTH - LEFT - RIGHT)

    ends = [*(step for step, _ in phases[1:]), math.inf]
    shown = [
        (x(max(step, first)), name)
        for (step, name), end in zip(phases, ends, strict=False)
        if step < last and end > first and len(phases) > 1
    ]
    labels = _place_labels(shown)
    upper_edge = TOP + LABEL_ROW * max((row for _, row, _ in labels), default=0)
    height = HEIGHT + upper_edge - TOP

    def y(value: float) -> float:
        return height - BOTTOM - (scale(value) - bottom) / (top - bottom) * (HEIGHT - TOP - BOTTOM)

    parts = [
        _svg_line(LEFT, y(tick), WIDTH - RIGHT, y(tick), "grid")
        + _svg_text(LEFT - 6, y(tick) + 3.5, _format_number(tick), "end")
        for tick in _ticks(bottom, top, log)
    ]
    for step, _ in phases:
        if first < step < last:
            parts.append(_svg_line(x(step), upper_edge, x(step), height - BOTTOM, "phase"))
    parts += [_svg_text(left, upper_edge - 4 - row * LABEL_ROW, name, "start") for left, row, name in labels]
    upper = [f"{x(s):.1f},{y(b):.1f}" for s, _, _, b in bins]
    lower = [f"{x(s):.1f},{y(a):.1f}" for s, a, _, _ in reversed(bins)]
    mean = [f"{x(s):.1f},{y(m):.1f}" for s, _, m, _ in bins]
    parts.append(Markup('<polygon class="spread" points="{}"/>').format(" ".join(upper + lower)))
    parts.append(Markup('<polyline class="curve" points="{}"/>').format(" ".join(mean)))
    parts += [
        _svg_text(LEFT, height - 6, _format_number(first), "start"),
        _svg_text(WIDTH - RIGHT, height - 6, _format_number(last), "end"),
    ]
    return _svg_image(WIDTH, height, f"{title} over steps", parts)


def graph_svg(steps: Sequence[StepNode]) -> Markup:
    """The steps from left to right, each to the right of its upstream steps, with durations as text and as bars."""
    if not steps:
        return Markup("")
    columns, routes = _layout(steps)
    rows = max(map(len, columns))
    width = len(columns) * (NODE_WIDTH + COLUMN_GAP) - COLUMN_GAP + 2
    height = rows * (NODE_HEIGHT + ROW_GAP) - ROW_GAP + 2
    longest = max((step.seconds or 0.0 for step in steps), default=0.0) or 1.0
    corners = {}
    for i, column in enumerate(columns):
        above = (rows - len(column)) * (NODE_HEIGHT + ROW_GAP) / 2  # columns are centred vertically
        for j, slot in enumerate(column):
            corners[slot] = (i * (NODE_WIDTH + COLUMN_GAP) + 1, above + j * (NODE_HEIGHT + ROW_GAP) + 1)
    parts = [_arrow([corners[slot] for slot in route]) for route in routes]
    for step in steps:
        left, top = corners[step.name]
        bar_width = (step.seconds or 0.0) / longest * (NODE_WIDTH - 24)
        time_text = "" if step.seconds is None else format_duration(step.seconds)
        details = (
            step.kind if step.subject else "",
            step.state if step.state != "finished" else "",
            time_text,
        )
        parts += [
            Markup('<rect class="node {}" x="{:.0f}" y="{:.0f}" width="{}" height="{}" rx="8"/>').format(
                _node_class(step.state),
                left,
                top,
                NODE_WIDTH,
                NODE_HEIGHT,
            ),
            _svg_text(
                left + 12, top + 19, _truncate(step.subject or step.kind or step.name), "start", "name"
            ),
            _svg_text(left + 12, top + 34, " · ".join(word for word in details if word), "start"),
            Markup('<rect class="bar" x="{:.0f}" y="{:.0f}" width="{:.1f}" height="3" rx="1.5"/>').format(
                left + 12, top + NODE_HEIGHT - 9, max(bar_width, 2.0) if step.seconds else 0.0
            ),
        ]
    return _svg_image(width, height, "steps of the run", parts, fixed=True)


def _node_class(state: str) -> str:
    """finished, failed, or `open` and the state's first word: running 52% -> open running."""
    word = state.partition(" ")[0]
    return word if word in ("finished", "failed") else f"open {word}".strip()


def _layout(steps: Sequence[StepNode]) -> tuple[list[list[str]], list[list[str]]]:
    """Assign steps to columns and route the arrows; returns the columns of slots, and the path of each arrow.

    A step's column is the length of its longest path from a first step. An arrow across several columns gets its own
    slot in each, so that it does not run behind a step. Slots are sorted by the mean position of their sources.
    """
    by_name: Mapping[str, StepNode] = {step.name: step for step in steps}
    depth: dict[str, int] = {}

    def column_of(name: str, visited: frozenset[str]) -> int:
        if name in visited:
            raise ValueError(f"step {name!r} needs itself")
        if name not in depth:
            needs = [need for need in by_name[name].needs if need in by_name]
            depth[name] = 1 + max((column_of(need, visited | {name}) for need in needs), default=-1)
        return depth[name]

    columns: list[list[str]] = [
        [] for _ in range(1 + max(column_of(step.name, frozenset()) for step in steps))
    ]
    sources: dict[str, list[str]] = {}
    routes = []
    for step in steps:
        columns[depth[step.name]].append(step.name)
    for step in steps:
        for need in _direct_needs(step, by_name):
            route = [need]
            for i in range(depth[need] + 1, depth[step.name]):
                route.append(f"{need}>{step.name}>{i}")
                columns[i].append(route[-1])
            routes.append([*route, step.name])
            for before, after in pairwise(routes[-1]):
                sources.setdefault(after, []).append(before)
    for left, column in pairwise(columns):
        height = {slot: i for i, slot in enumerate(left)}
        mean = {
            slot: fmean(height[source] for source in sources[slot] if source in height) for slot in column
        }
        column.sort(key=mean.__getitem__)
    return columns, routes


def _direct_needs(step: StepNode, by_name: Mapping[str, StepNode]) -> list[str]:
    """The needs that are not also needs of another need: one arrow each (a transitive reduction)."""

    def upstream(name: str) -> set[str]:
        needs = by_name[name].needs if name in by_name else ()
        return set(needs).union(*(upstream(need) for need in needs))

    indirect = set().union(*(upstream(need) for need in step.needs))
    return [need for need in step.needs if need in by_name and need not in indirect]


def _place_labels(labels: Sequence[tuple[float, str]]) -> list[tuple[float, int, str]]:
    """(left, row, text) of labels that begin at the given x: each in the lowest row in which it overlaps no other.

    A label that would leave the chart at its right side is moved to the left.
    """
    placed: list[tuple[float, int, str]] = []
    rows: list[list[tuple[float, float]]] = []
    for start, text in labels:
        width = len(text) * LABEL_CHAR_WIDTH
        left = max(0.0, min(start + 3, WIDTH - width))
        taken = [any(left < end and begin < left + width for begin, end in row) for row in rows]
        row = taken.index(False) if False in taken else len(rows)
        if row == len(rows):
            rows.append([])
        rows[row].append((left, left + width))
        placed.append((left, row, text))
    return placed


def _downsample(points: Sequence[tuple[float, float]]) -> list[tuple[float, float, float, float]]:
    """(step, min, mean, max) of at most MAX_POINTS groups of neighbouring points; the first and last step stay."""
    size = -(-len(points) // MAX_POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    bins = []
    for i, group in enumerate(groups):
        values = [value for _, value in group]
        step = group[0][0] if i == 0 else group[-1][0]
        bins.append((step, min(values), sum(values) / len(values), max(values)))
    return bins


def _axis_range(low: float, high: float) -> tuple[float, float]:
    margin = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return low - margin, high + margin


def _ticks(bottom: float, top: float, log: bool) -> list[float]:
    """Three to five round values between bottom and top (exponents of 10 if log)."""
    if log and top - bottom >= 2:
        spacing = math.ceil((top - bottom) / 5)
        return [10.0**e for e in range(math.ceil(bottom), math.floor(top) + 1, spacing)]
    raw_step = (top - bottom) / 4
    power = 10.0 ** math.floor(math.log10(raw_step))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw_step)
    return [round(k * step, 12) for k in range(math.ceil(bottom / step), math.floor(top / step) + 1)]


def _format_number(value: float) -> str:
    if value and (abs(value) >= 1e6 or abs(value) < 1e-4):
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:,.0f}".replace(",", " ") if abs(value) >= 1000 else f"{value:g}"


def _truncate(name: str) -> str:
    return name if len(name) <= 20 else name[:19] + "…"


def _arrow(corners: Sequence[tuple[float, float]]) -> Markup:
    """A path from the right side of the first slot, straight through the slots between, to the left side of the last."""
    middle = NODE_HEIGHT / 2
    path = f"M{corners[0][0] + NODE_WIDTH:.1f} {corners[0][1] + middle:.1f}"
    for (x0, y0), (x1, y1) in pairwise(corners):
        bend = x0 + NODE_WIDTH + COLUMN_GAP / 2
        path += f"C{bend:.1f} {y0 + middle:.1f} {bend:.1f} {y1 + middle:.1f} {x1:.1f} {y1 + middle:.1f}"
        if (x1, y1) != corners[-1]:
            path += f"H{x1 + NODE_WIDTH:.1f}"
    return Markup('<path class="arrow" d="{}"/>').format(path)


def _svg_line(x0: float, y0: float, x1: float, y1: float, kind: str) -> Markup:
    return Markup('<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>').format(
        kind, x0, y0, x1, y1
    )


def _svg_text(x: float, y: float, text: str, anchor: str, kind: str = "label") -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(
        kind, x, y, anchor, escape(text)
    )


def _svg_image(width: float, height: float, label: str, parts: Sequence[str], fixed: bool = False) -> Markup:
    size = Markup(' width="{:.0f}" height="{:.0f}"').format(width, height) if fixed else Markup("")
    return Markup('<svg viewBox="0 0 {:.0f} {:.0f}"{} role="img" aria-label="{}">{}</svg>').format(
        width, height, size, label, Markup("").join(parts)
    )
