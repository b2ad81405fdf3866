"""Line charts and the graph of steps as SVG: small, sharp at any width, in the page's own type and colours."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from markupsafe import Markup, escape

WIDTH, HEIGHT = 320, 168
LEFT, RIGHT, TOP, BOTTOM = 44, 8, 14, 22
MOST_POINTS = 120
NODE_WIDTH, NODE_HEIGHT, ACROSS, DOWN = 164, 50, 44, 18

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class StepBox:
    """One step of a run: its upstream steps, wall-clock seconds (None: not run) and state."""

    name: str
    needs: tuple[str, ...] = ()
    seconds: float | None = None
    state: str = "finished"
    key: str = ""


def curve_svg(title: str, points: Points, phases: Sequence[tuple[float, str]] = ()) -> Markup:
    """One metric over steps: a line through the means of neighbouring points, over a faint band of their range.

    phases: (first step, name), marked by dotted lines. Values that span more than a factor of a hundred above zero
    are drawn on a logarithmic axis. Points that are not finite are left out.
    """
    kept = [(float(x), float(y)) for x, y in points if math.isfinite(y)]
    if not kept:
        return Markup("")
    bins = _thinned(sorted(kept))
    low, high = min(b[1] for b in bins), max(b[3] for b in bins)
    log = low > 0 and high / low > 100
    scale = math.log10 if log else float
    bottom, top = _range(scale(low), scale(high))
    first, last = bins[0][0], bins[-1][0]

    def x(step: float) -> float:
        return LEFT + (step - first) / ((last - first) or 1) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (scale(value) - bottom) / (top - bottom) * (HEIGHT - TOP - BOTTOM)

    parts = [
        _line(LEFT, y(tick), WIDTH - RIGHT, y(tick), "grid")
        + _text(LEFT - 6, y(tick) + 3.5, _number(tick), "end")
        for tick in _ticks(bottom, top, log)
    ]
    for step, name in phases:
        if first < step < last:
            parts.append(_line(x(step), TOP, x(step), HEIGHT - BOTTOM, "phase"))
        if step < last and len(phases) > 1:
            parts.append(_text(x(max(step, first)) + 3, TOP - 4, name, "start"))
    upper = [f"{x(s):.1f},{y(b):.1f}" for s, _, _, b in bins]
    lower = [f"{x(s):.1f},{y(a):.1f}" for s, a, _, _ in reversed(bins)]
    mean = [f"{x(s):.1f},{y(m):.1f}" for s, _, m, _ in bins]
    parts.append(Markup('<polygon class="spread" points="{}"/>').format(" ".join(upper + lower)))
    parts.append(Markup('<polyline class="curve" points="{}"/>').format(" ".join(mean)))
    parts += [
        _text(LEFT, HEIGHT - 6, _number(first), "start"),
        _text(WIDTH - RIGHT, HEIGHT - 6, _number(last), "end"),
    ]
    return _svg(WIDTH, HEIGHT, f"{title} over steps", parts)


def graph_svg(steps: Sequence[StepBox]) -> Markup:
    """The steps from left to right, each right of what it needs, with durations and a bar for its share of the time."""
    if not steps:
        return Markup("")
    columns, ways = _layout(steps)
    rows = max(map(len, columns))
    width = len(columns) * (NODE_WIDTH + ACROSS) - ACROSS + 2
    height = rows * (NODE_HEIGHT + DOWN) - DOWN + 2
    longest = max((step.seconds or 0.0 for step in steps), default=0.0) or 1.0
    corner = {}
    for i, column in enumerate(columns):
        above = (rows - len(column)) * (NODE_HEIGHT + DOWN) / 2  # columns are centred
        for j, place in enumerate(column):
            corner[place] = (i * (NODE_WIDTH + ACROSS) + 1, above + j * (NODE_HEIGHT + DOWN) + 1)
    parts = [_arrow([corner[place] for place in way]) for way in ways]
    for step in steps:
        left, top = corner[step.name]
        share = (step.seconds or 0.0) / longest * (NODE_WIDTH - 24)
        kind, _, subject = step.name.partition("-")
        took = "" if step.seconds is None else duration(step.seconds)
        words = (kind if subject else "", step.state if step.state != "finished" else "", took)
        parts += [
            Markup('<rect class="node {}" x="{:.0f}" y="{:.0f}" width="{}" height="{}" rx="8"/>').format(
                step.state if step.state in ("finished", "failed") else "open",
                left,
                top,
                NODE_WIDTH,
                NODE_HEIGHT,
            ),
            _text(left + 12, top + 19, _clip(subject or kind), "start", "name"),
            _text(left + 12, top + 34, " · ".join(word for word in words if word), "start"),
            Markup('<rect class="bar" x="{:.0f}" y="{:.0f}" width="{:.1f}" height="3" rx="1.5"/>').format(
                left + 12, top + NODE_HEIGHT - 9, max(share, 2.0) if step.seconds else 0.0
            ),
        ]
    return _svg(width, height, "steps of the run", parts, fixed=True)


def duration(seconds: float) -> str:
    """0.4 s, 12 s, 3 min 20 s, 2 h 05 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _layout(steps: Sequence[StepBox]) -> tuple[list[list[str]], list[list[str]]]:
    """Columns of places, and the way of every arrow through them.

    A step stands in the column of the longest way to it. An arrow over several columns gets a place of its own in
    each, so that it never runs behind a step; places are ordered by those they come from.
    """
    by_name: Mapping[str, StepBox] = {step.name: step for step in steps}
    depth: dict[str, int] = {}

    def deep(name: str, seen: frozenset[str]) -> int:
        if name in seen:
            raise ValueError(f"step {name!r} needs itself")
        if name not in depth:
            needs = [need for need in by_name[name].needs if need in by_name]
            depth[name] = 1 + max((deep(need, seen | {name}) for need in needs), default=-1)
        return depth[name]

    columns: list[list[str]] = [[] for _ in range(1 + max(deep(step.name, frozenset()) for step in steps))]
    sources: dict[str, list[str]] = {}
    ways = []
    for step in steps:
        columns[depth[step.name]].append(step.name)
    for step in steps:
        for need in _direct(step, by_name):
            way = [need]
            for i in range(depth[need] + 1, depth[step.name]):
                way.append(f"{need}>{step.name}>{i}")
                columns[i].append(way[-1])
            ways.append([*way, step.name])
            for before, after in pairwise(ways[-1]):
                sources.setdefault(after, []).append(before)
    for left, column in pairwise(columns):
        height = {place: i for i, place in enumerate(left)}
        mean = {
            place: fmean(height[source] for source in sources[place] if source in height) for place in column
        }
        column.sort(key=mean.__getitem__)
    return columns, ways


def _direct(step: StepBox, by_name: Mapping[str, StepBox]) -> list[str]:
    """What a step needs and none of its other needs already needs: the arrows worth drawing."""

    def upstream(name: str) -> set[str]:
        needs = by_name[name].needs if name in by_name else ()
        return set(needs).union(*(upstream(need) for need in needs))

    indirect = set().union(*(upstream(need) for need in step.needs))
    return [need for need in step.needs if need in by_name and need not in indirect]


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float, float, float]]:
    """(step, least, mean, most) of at most MOST_POINTS runs of neighbouring points; the ends stay."""
    size = -(-len(points) // MOST_POINTS)
    runs = [points[i : i + size] for i in range(0, len(points), size)]
    found = []
    for i, run in enumerate(runs):
        values = [value for _, value in run]
        step = run[0][0] if i == 0 else run[-1][0]
        found.append((step, min(values), sum(values) / len(values), max(values)))
    return found


def _range(low: float, high: float) -> tuple[float, float]:
    margin = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return low - margin, high + margin


def _ticks(bottom: float, top: float, log: bool) -> list[float]:
    """Three to five round values between bottom and top (which are exponents when log)."""
    if log and top - bottom >= 2:
        apart = math.ceil((top - bottom) / 5)
        return [10.0**e for e in range(math.ceil(bottom), math.floor(top) + 1, apart)]
    rough = (top - bottom) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough)
    return [round(k * step, 12) for k in range(math.ceil(bottom / step), math.floor(top / step) + 1)]


def _number(value: float) -> str:
    if value and (abs(value) >= 1e6 or abs(value) < 1e-4):
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:,.0f}".replace(",", " ") if abs(value) >= 1000 else f"{value:g}"


def _clip(name: str) -> str:
    return name if len(name) <= 20 else name[:19] + "…"


def _arrow(corners: Sequence[tuple[float, float]]) -> Markup:
    """From the right side of the first place, straight through those between, to the left side of the last."""
    middle = NODE_HEIGHT / 2
    path = f"M{corners[0][0] + NODE_WIDTH:.1f} {corners[0][1] + middle:.1f}"
    for (x0, y0), (x1, y1) in pairwise(corners):
        bend = x0 + NODE_WIDTH + ACROSS / 2
        path += f"C{bend:.1f} {y0 + middle:.1f} {bend:.1f} {y1 + middle:.1f} {x1:.1f} {y1 + middle:.1f}"
        if (x1, y1) != corners[-1]:
            path += f"H{x1 + NODE_WIDTH:.1f}"
    return Markup('<path class="arrow" d="{}"/>').format(path)


def _line(x0: float, y0: float, x1: float, y1: float, kind: str) -> Markup:
    return Markup('<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>').format(
        kind, x0, y0, x1, y1
    )


def _text(x: float, y: float, text: str, anchor: str, kind: str = "label") -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(
        kind, x, y, anchor, escape(text)
    )


def _svg(width: float, height: float, label: str, parts: Sequence[str], fixed: bool = False) -> Markup:
    size = Markup(' width="{:.0f}" height="{:.0f}"').format(width, height) if fixed else Markup("")
    return Markup('<svg viewBox="0 0 {:.0f} {:.0f}"{} role="img" aria-label="{}">{}</svg>').format(
        width, height, size, label, Markup("").join(parts)
    )
