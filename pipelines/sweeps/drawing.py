"""How a sweep's pictures are drawn: one width, one type, one pair of colours, labels beside what they name."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullLocator
from PIL import Image

from pipelines.sweeps.analysis import Axis, shown

INK, SOFT, LINE = "#1d1d1f", "#6e6e76", "#ececf0"
BLUE, PALE = "#2563eb", "#9db8f2"
BEST = "#d55e00"  # vermilion: apart from the blue for every kind of colour vision
WORDS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#000000")  # Okabe and Ito's
LARGEST = 250_000  # bytes of a picture
WIDTH, DPI = 5.4, 200  # inches: 1080 pixels, three to a phone's one
NOTE_CHARACTERS, NOTE_LINE = 98, 0.135
LOG_RATIO = 30  # scores that span more than this are drawn on a logarithmic axis

STYLE: Any = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same everywhere
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#c9c9cf",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "axes.titlepad": 8,
    "xtick.color": "#c9c9cf",
    "ytick.color": "#c9c9cf",
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": SOFT,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "text.parse_math": False,  # a name with two dollar signs is a name
}
styled = matplotlib.rc_context(STYLE)
"""Decorates what draws: text takes its type from the style at the time it is set."""
HALO = [patheffects.withStroke(linewidth=2.5, foreground="white")]


class Sheet:
    """A picture of stacked panels (heights in inches) over a note in small type; `axes` are the panels."""

    def __init__(
        self,
        panels: Sequence[float],
        note: str = "",
        *,
        left: float = 0.62,
        right: float = 0.2,
        below: float = 0.46,
        above: float = 0.36,
    ) -> None:
        lines = [line for part in note.split("\n") if part for line in textwrap.wrap(part, NOTE_CHARACTERS)]
        foot = 0.12 + NOTE_LINE * len(lines) if lines else 0.0
        height = foot + sum(above + panel + below for panel in panels)
        self.axes: list[Axes] = []
        self.figure = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor="white")
        top = height
        for panel in panels:
            top -= above + panel
            box = (left / WIDTH, top / height, (WIDTH - left - right) / WIDTH, panel / height)
            self.axes.append(self.figure.add_axes(box))
            top -= below
        self.figure.text(
            0.12 / WIDTH, 0.09 / height, "\n".join(lines), fontsize=7, color=SOFT, linespacing=1.32
        )

    def png(self) -> bytes:
        """1080 pixels wide, of 256 colours, which no eye tells; of fewer where hundreds of lines make it large."""
        canvas = FigureCanvasAgg(self.figure)
        canvas.draw()
        picture = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
        data = b""
        for colours in (256, 96, 32):
            buffer = io.BytesIO()
            picture.quantize(colours, dither=Image.Dither.NONE).save(buffer, format="PNG", optimize=True)
            data = buffer.getvalue()
            if len(data) <= LARGEST:
                break
        return data


def titled(ax: Axes, title: str, beside: str = "") -> None:
    """A panel's title at the left, how to read it at the right."""
    ax.set_title(title, loc="left", fontweight="bold", color=INK)
    ax.set_title(beside, loc="right", fontsize=8, color=SOFT)


def horizontal(ax: Axes, axis: Axis) -> None:
    """Lay a field's axis along the bottom, with the break before a logarithmic axis' 0."""
    low, high = axis.ends
    margin = 0.5 if axis.kind == "places" else 0.05 * (high - low)
    ax.set_xlim(low - margin, high + margin)
    labels = [label for _, label in axis.ticks]
    ax.xaxis.set_major_locator(FixedLocator([position for position, _ in axis.ticks]))
    long = sum(map(len, labels)) > 52
    ax.set_xticklabels(
        [clipped(label, 16) for label in labels], rotation=30 if long else 0, ha="right" if long else "center"
    )
    ax.tick_params(axis="x", length=3)
    if axis.broken is not None:
        mark = 0.008 * (high - low)
        across = ax.get_xaxis_transform()
        ax.plot(
            [axis.broken - mark, axis.broken + mark],
            [0, 0],
            color="white",
            lw=2,
            transform=across,
            clip_on=False,
        )
        for at in (axis.broken - mark, axis.broken + mark):
            x = [at - mark, at + mark]
            ax.plot(x, [-0.02, 0.02], color=SOFT, lw=0.8, transform=across, clip_on=False)


def vertical(ax: Axes, low: float, high: float, log: bool) -> None:
    """Lay a score's axis up a panel, with room above and below for labels, and faint lines across."""
    _score_axis(ax, "y", low, high, log)
    ax.grid(axis="y", color=LINE, lw=0.8)
    ax.set_axisbelow(True)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)


def across(ax: Axes, low: float, high: float, log: bool) -> None:
    """Lay a score's axis along the bottom."""
    _score_axis(ax, "x", low, high, log)
    ax.tick_params(axis="x", length=3)


def _score_axis(ax: Axes, way: Literal["x", "y"], low: float, high: float, log: bool) -> None:
    axis = ax.xaxis if way == "x" else ax.yaxis
    if not log:
        room = 0.14 * (high - low) or 0.02 * abs(high) or 1.0
        ax.set(**{f"{way}lim": (low - room, high + room)})
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        return
    room = (high / low) ** 0.14
    ax.set(**{f"{way}scale": "log", f"{way}lim": (low / room, high * room)})
    axis.set_major_locator(LogLocator(subs=(1.0, 3.0) if high / low < 300 else (1.0,)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: shown(float(value)))


def beside(ax: Axes, name: str) -> None:
    """What the labels in the right margin are values of."""
    ax.annotate(
        broken_name(name, 15), (1.03, 1), (0, 8), xycoords="axes fraction", textcoords="offset points",
        fontsize=7.5, color=SOFT, annotation_clip=False,
    )  # fmt: skip


def wide(values: Sequence[float]) -> bool:
    """Whether scores need a logarithmic axis."""
    return min(values) > 0 and max(values) / min(values) >= LOG_RATIO


def shade(place: float) -> tuple[float, float, float]:
    """A colour for a place in [0,1]: dark violet to green, viridis without its yellow that white swallows."""
    red, green, blue, _ = matplotlib.colormaps["viridis"](0.86 * place)
    return red, green, blue


def shades(axis: Axis) -> dict[Any, Any]:
    """A colour for every value of a field: along one scale for numbers, distinct ones for words."""
    if axis.kind == "places":
        return {value: WORDS[i % len(WORDS)] for i, value in enumerate(axis.values)}
    low, high = axis.ends
    return {value: shade((axis.position(value) - low) / (high - low)) for value in axis.values}


def spread_apart(wanted: Sequence[float], apart: float, low: float, high: float) -> list[float]:
    """Places at least `apart` from each other, in the wanted ones' order and as near to them as it goes.

    They stay within low and high when there is room; neighbours that would overlap become a run around their mean.
    """
    order = np.argsort(wanted, kind="stable")
    runs: list[list[float]] = []  # (centre, members) of labels that touch
    for index in order:
        runs.append([wanted[index], 1])
        while len(runs) > 1 and runs[-1][0] - runs[-2][0] < apart * (runs[-1][1] + runs[-2][1]) / 2:
            centre, members = runs.pop()
            before, others = runs[-1]
            runs[-1] = [(centre * members + before * others) / (members + others), members + others]
    placed = [
        centre + apart * (i - (members - 1) / 2) for centre, members in runs for i in range(round(members))
    ]
    for i in range(len(placed)):  # up from the lower end, then down from the upper one
        placed[i] = max(placed[i], low if i == 0 else placed[i - 1] + apart)
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], high if i == len(placed) - 1 else placed[i + 1] - apart)
    found = [0.0] * len(placed)
    for index, place in zip(order, placed, strict=True):
        found[int(index)] = place
    return found


def margin_labels(ax: Axes, labels: Sequence[tuple[float, str, Any]], lead: bool = True) -> None:
    """Labels (height, text, colour) right of a panel at their heights, moved apart where they would overlap."""
    if not labels:
        return
    to_axes = ax.transData + ax.transAxes.inverted()
    x = ax.get_xlim()[1]
    heights = [float(to_axes.transform((x, height))[1]) for height, *_ in labels]
    inches = ax.get_position().height * ax.figure.get_figheight()  # type: ignore[union-attr]
    for (_, text, colour), here, place in zip(
        labels, heights, spread_apart(heights, 0.14 / inches, 0.0, 1.0), strict=True
    ):
        if lead:
            ax.plot(
                [1.0, 1.02], [here, place], color="#c9c9cf", lw=0.6, transform=ax.transAxes, clip_on=False
            )
        ax.text(
            1.03, place, text, transform=ax.transAxes, va="center", fontsize=7.5, color=colour, clip_on=False
        )


def label_points(
    ax: Axes,
    points: Sequence[tuple[float, float, str, Any]],
    avoid: Sequence[Sequence[tuple[float, float]]] = (),
    size: float = 7.5,
) -> None:
    """Labels (x, y, text, colour) beside their points, where they hide the least of points and lines (to `avoid`)."""
    places = [ax.transData.transform((x, y)) for x, y, *_ in points]
    frame = ax.get_window_extent()
    taken: list[Box] = [(x - 9, y - 9, x + 9, y + 9) for x, y in places]
    taken += [box for line in avoid for box in _boxes(ax.transData.transform(line))]
    for (_, _, text, colour), (x, y) in zip(points, places, strict=True):
        width, height = 0.64 * size / 72 * DPI * len(text), 1.25 * size / 72 * DPI

        def cost(box: Box) -> float:
            hidden = sum(_overlap(box, other) for other in taken)
            beyond = (frame.x0 - box[0], frame.y0 - box[1], box[2] - frame.x1, box[3] - frame.y1)
            return hidden + 100 * sum(max(0.0, far) for far in beyond)

        candidates = []
        for order, (far, turn) in enumerate((far, turn) for far in (14, 26, 40) for turn in range(8)):
            dx, dy = math.cos(turn * math.pi / 4), math.sin(turn * math.pi / 4)
            left, bottom = x + dx * far - width * (1 - dx) / 2, y + dy * (far + height / 2) - height / 2
            box = (left, bottom, left + width, bottom + height)
            candidates.append((cost(box) + 3 * order, box))
        box = min(candidates)[1]
        taken.append(box)
        centre, middle = ax.transData.inverted().transform(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2))
        ax.text(
            centre, middle, text, fontsize=size, fontweight="bold" if colour == BEST else "normal", color=colour,
            ha="center", va="center", path_effects=HALO, zorder=8,
        )  # fmt: skip


Box = tuple[float, float, float, float]
"""(left, bottom, right, top) in pixels."""


def _boxes(line: np.ndarray) -> list[Box]:
    """Small boxes along a line [n,2] in pixels."""
    found = []
    for (x0, y0), (x1, y1) in pairwise(line.tolist()):
        count = max(1, round(math.hypot(x1 - x0, y1 - y0) / 6))
        steps = [(x0 + (x1 - x0) * i / count, y0 + (y1 - y0) * i / count) for i in range(count + 1)]
        found += [(x - 3, y - 3, x + 3, y + 3) for x, y in steps]
    return found


def _overlap(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def clipped(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def broken_name(path: str, width: int) -> str:
    """A recipe path in lines of about `width`, broken after dots, and after underscores where that is not enough."""
    lines = [""]
    for part in path.replace(".", ".\0").split("\0"):
        pieces = [part] if len(part) <= width else part.replace("_", "_\0").split("\0")
        for piece in pieces:
            if lines[-1] and len(lines[-1] + piece) > width:
                lines.append("")
            lines[-1] += piece
    return "\n".join(lines)
