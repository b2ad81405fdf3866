"""Charts of scores as inline SVG: over the versions of a model, and over the hole-area bands of one version.

Colours come from classes in models.css. Every chart has a text alternative, and the page a table of the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

LINE_HEIGHT = 12  # pixels between the labels beside a chart
MAX_INTERVALS = 80  # versions: with more, their intervals would be one dark area


MAX_SPARKLINE_DOTS = 40


@dataclass(frozen=True)
class VersionPoint:
    """One version in a chart over versions."""

    version: str
    value: float
    low: float | None = None
    """Ends of the 95 % interval; None: not on record."""
    high: float | None = None
    aliases: tuple[str, ...] = ()
    comparable: bool = True
    """Scored under the same protocol as the newest version."""
    href: str = ""


@dataclass(frozen=True)
class BandPoint:
    """The score of one hole-area band ("all": all photographs)."""

    band: str
    value: float
    low: float | None = None
    high: float | None = None
    count: int | None = None
    """Photographs in the band."""


@dataclass(frozen=True)
class BandPanel:
    """One metric of one version over the bands, and the untrained methods beside it."""

    title: str
    points: tuple[BandPoint, ...]
    digits: int = 2
    baselines: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Method's title -> band -> score."""
    higher_is_better: bool = True


def versions_chart(
    title: str, points: Sequence[VersionPoint], digits: int = 2, narrow: bool = False
) -> Markup:
    """The scores of the versions in the order of `points`: dots with intervals, joined where they are comparable.

    narrow: for a phone. Markup(""): no finite value.
    """
    finite = [point for point in points if math.isfinite(point.value)]
    if not finite:
        return Markup("")
    many = len(finite) > MAX_INTERVALS
    width, left, right, bottom = (380, 40, 10, 26) if narrow else (960, 52, 16, 26)
    inner = width - left - right - 20
    x = [left + 10 + i * inner / max(len(finite) - 1, 1) for i in range(len(finite))]
    if len(finite) == 1:
        x = [(left + width - right) / 2]
    labels = _alias_labels(finite, x, width)
    top = 18 + LINE_HEIGHT * (1 + max((row for *_, row in labels), default=-1))
    height = top + (176 if narrow else 188)
    ends = [end for p in finite for end in (p.low, p.high) if end is not None and not many]
    scale = _Scale([p.value for p in finite] + ends, top, height - bottom)
    parts = _grid(scale, left, width - right, digits)
    for at, _, _, row in labels:
        y = scale(finite[at].value)
        parts.append(
            Markup('<line class="divide" x1="{0:.1f}" y1="{1:.1f}" x2="{0:.1f}" y2="{2:.1f}"/>').format(
                x[at], 15 + LINE_HEIGHT * row, y
            )
        )
    line = [f"{x[i]:.1f},{scale(point.value):.1f}" for i, point in enumerate(finite) if point.comparable]
    if not many:
        parts.append(Markup('<polyline class="over-versions" points="{}"/>').format(" ".join(line)))
    radius = 1.7 if many else 3 if narrow else 4
    order = sorted(range(len(finite)), key=lambda i: bool(finite[i].aliases))  # those with aliases on top
    for i in order:
        point, y = finite[i], scale(finite[i].value)
        if point.low is not None and point.high is not None and not many:
            parts.append(_interval(x[i], scale(point.low), scale(point.high)))
        kind = "dot" + ("" if point.comparable else " other") + (" has-alias" if point.aliases else "")
        kind += " many" if many and not point.aliases else ""
        dot = Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="{}"><title>{}</title></circle>').format(
            kind, x[i], y, 5 if point.aliases else radius, _version_title(point, digits)
        )
        if point.href and not many:
            dot = Markup('<a href="{}" tabindex="-1">{}</a>').format(point.href, dot)
        parts.append(dot)
    for _, middle, text, row in labels:
        parts.append(_text(middle, 12 + LINE_HEIGHT * row, text, "middle", "alias"))
    shown = {0, len(finite) - 1} | set(range(0, len(finite), -(-len(finite) // (6 if narrow else 16))))
    for i in sorted(shown):
        if i == len(finite) - 1 or x[-1] - x[i] > 24:
            parts.append(_text(x[i], height - 6, finite[i].version, "middle"))
    first, last = finite[0], finite[-1]
    label = (
        f"{title} over {len(finite)} versions: {first.value:.{digits}f} in version {first.version}, "
        f"{last.value:.{digits}f} in version {last.version}"
    )
    return _svg(width, height, label, parts, role="group" if not many else "img")


def sparkline(title: str, points: Sequence[VersionPoint], digits: int = 2) -> Markup:
    """A small chart of scores over versions, without axes; the champion is a larger dot. Markup(""): no finite value."""
    finite = [point for point in points if math.isfinite(point.value)]
    if not finite:
        return Markup("")
    width, height, margin = 240, 48, 7
    scale = _Scale([p.value for p in finite], margin, height - margin)
    step = (width - 2 * margin) / max(len(finite) - 1, 1)
    x = [margin + i * step if len(finite) > 1 else width / 2 for i in range(len(finite))]
    line = [f"{x[i]:.1f},{scale(point.value):.1f}" for i, point in enumerate(finite) if point.comparable]
    parts = [Markup('<polyline class="over-versions" points="{}"/>').format(" ".join(line))]
    for i, point in enumerate(finite):
        is_champion = "champion" in point.aliases
        few = len(finite) <= MAX_SPARKLINE_DOTS
        if is_champion or few or not point.comparable:
            kind = ("dot" if point.comparable else "dot other") + (" has-alias" if is_champion else "")
            parts.append(
                Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="{}"/>').format(
                    kind, x[i], scale(point.value), 4.5 if is_champion else 2 if few else 0.8
                )
            )
    values = [point.value for point in finite]
    label = f"{title} over {len(finite)} versions, {min(values):.{digits}f} to {max(values):.{digits}f}"
    return _svg(width, height, label, parts)


def bands_chart(panel: BandPanel) -> Markup:
    """A version's scores by band with intervals, over grey lines of the untrained methods. Markup(""): no score."""
    points = [point for point in panel.points if math.isfinite(point.value)]
    if not points:
        return Markup("")
    bands = [point.band for point in points]
    values = [p.value for p in points] + [end for p in points for end in (p.low, p.high) if end is not None]
    lines = {
        method: {band: y for band, y in scores.items() if band in bands and math.isfinite(y)}
        for method, scores in panel.baselines.items()
    }
    lines = {method: scores for method, scores in lines.items() if scores}
    values += [value for scores in lines.values() for value in scores.values()]
    width, height, left, top, bottom = 360, 208, 46, 14, 36
    right = 96 if lines else 14
    scale = _Scale(values, top, height - bottom)
    step = (width - left - right) / len(bands)
    x = {band: left + (i + 0.5) * step for i, band in enumerate(bands)}
    parts = _grid(scale, left, width - right, min(panel.digits, 3))
    if len(bands) > 1 and bands[0] == "all":
        edge = left + step
        parts.append(
            Markup('<line class="divide" x1="{0:.1f}" y1="{1}" x2="{0:.1f}" y2="{2}"/>').format(
                edge, top, height - bottom
            )
        )
    half = min(step * 0.36, 26)
    labels: list[tuple[float, str]] = []
    for method, scores in lines.items():
        for band, value in scores.items():
            y = scale(value)
            parts.append(
                Markup(
                    '<line class="baseline" x1="{:.1f}" y1="{y:.1f}" x2="{:.1f}" y2="{y:.1f}"><title>{}</title></line>'
                ).format(x[band] - half, x[band] + half, f"{method}: {value:.{panel.digits}f}", y=y)
            )
        last = next(band for band in reversed(bands) if band in scores)
        labels.append((scale(scores[last]), method))
    trend = [f"{x[p.band]:.1f},{scale(p.value):.1f}" for p in points if p.band != "all"]
    parts.append(Markup('<polyline class="over-versions" points="{}"/>').format(" ".join(trend)))
    for point in points:
        if point.low is not None and point.high is not None:
            parts.append(_interval(x[point.band], scale(point.low), scale(point.high)))
        title = f"{_band_title(point.band)}: {_value_text(point, panel.digits)}"
        parts.append(
            Markup(
                '<circle class="dot has-alias" cx="{:.1f}" cy="{:.1f}" r="4.5"><title>{}</title></circle>'
            ).format(x[point.band], scale(point.value), title)
        )
        parts.append(_text(x[point.band], height - 20, point.band, "middle"))
        if point.count is not None:
            parts.append(_text(x[point.band], height - 7, f"n {point.count}", "middle"))
    for y, name in _spread(labels, top + 4, height - bottom + 6):
        parts.append(_text(width - right + 6, y + 3.5, name, "start"))
    label = f"{panel.title} by hole area: " + ", ".join(
        f"{_band_title(point.band)} {_value_text(point, panel.digits)}" for point in points
    )
    return _svg(width, height, label, parts)


class _Scale:
    """Values -> y coordinates between `top` and `bottom`, with a margin."""

    def __init__(self, values: Sequence[float], top: float, bottom: float) -> None:
        low, high = min(values), max(values)
        margin = (high - low) * 0.08 or abs(high) * 0.02 or 1.0
        self.low, self.high, self._top, self._bottom = low - margin, high + margin, top, bottom

    def __call__(self, value: float) -> float:
        return self._bottom - (value - self.low) / (self.high - self.low) * (self._bottom - self._top)

    @property
    def ticks(self) -> list[float]:
        """Three to five round values."""
        raw = (self.high - self.low) / 4
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
        return [
            round(k * step, 12) for k in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)
        ]


def _grid(scale: _Scale, left: float, right: float, digits: int) -> list[Markup]:
    parts = []
    for tick in scale.ticks:
        y = scale(tick)
        parts.append(
            Markup('<line class="grid" x1="{:.1f}" y1="{y:.1f}" x2="{:.1f}" y2="{y:.1f}"/>').format(
                left, right, y=y
            )
        )
        text = f"{tick:.{digits}f}" if digits < 3 else f"{tick:g}"
        parts.append(_text(left - 7, y + 3.5, text.rstrip("0").rstrip(".") if "." in text else text, "end"))
    return parts


def _interval(x: float, low: float, high: float) -> Markup:
    return Markup('<line class="interval" x1="{0:.1f}" y1="{1:.1f}" x2="{0:.1f}" y2="{2:.1f}"/>').format(
        x, low, high
    )


def _alias_labels(
    points: Sequence[VersionPoint], x: Sequence[float], width: float
) -> list[tuple[int, float, str, int]]:
    """(index, middle, text, row) of the aliases above the chart; labels that would overlap are in rows."""
    placed: list[tuple[int, float, str, int]] = []
    ends: list[float] = []
    for i, point in enumerate(points):
        if point.aliases:
            text = ", ".join(point.aliases)
            half = 3.7 * len(text)
            middle = min(max(x[i], half), width - half)
            row = next((row for row, end in enumerate(ends) if end < middle - half - 6), len(ends))
            ends[row : row + 1] = [middle + half]
            placed.append((i, middle, text, row))
    return placed


def _spread(labels: Sequence[tuple[float, str]], top: float, bottom: float) -> list[tuple[float, str]]:
    """(y, text) moved apart so that the texts do not overlap."""
    placed: list[tuple[float, str]] = []
    for y, text in sorted(labels):
        y = max(y, top, placed[-1][0] + LINE_HEIGHT if placed else top)
        placed.append((y, text))
    shift = max(0.0, placed[-1][0] - bottom) if placed else 0.0
    return [(y - shift, text) for y, text in placed]


def _version_title(point: VersionPoint, digits: int) -> str:
    aliases = f" ({', '.join(point.aliases)})" if point.aliases else ""
    other = "" if point.comparable else "; another protocol, not comparable"
    return f"version {point.version}{aliases}: {_value_text(point, digits)}{other}"


def _value_text(point: VersionPoint | BandPoint, digits: int) -> str:
    text = f"{point.value:.{digits}f}"
    if point.low is None or point.high is None:
        return text
    return f"{text} (95 % interval {point.low:.{digits}f} to {point.high:.{digits}f})"


def _band_title(band: str) -> str:
    return "all holes" if band == "all" else f"holes of {band} %"


def _text(x: float, y: float, text: str, anchor: str, kind: str = "label") -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(
        kind, x, y, anchor, text
    )


def _svg(width: float, height: float, label: str, parts: Sequence[Markup], role: str = "img") -> Markup:
    return Markup('<svg viewBox="0 0 {:.0f} {:.0f}" role="{}" aria-label="{}">{}</svg>').format(
        width, height, role, label, Markup("").join(parts)
    )
