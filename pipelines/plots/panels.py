"""The style of all matplotlib plots: stacked panels over a note, with their fonts and colours."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

TEXT_COLOR, MUTED_COLOR, LINE_COLOR = "#1d1d1f", "#6e6e76", "#ececf0"
BLUE, PALE_BLUE = "#2563eb", "#9db8f2"
MAX_PNG_BYTES = 250_000
WIDTH_INCHES, DPI = 5.4, 200  # 1080 pixels, three for each logical pixel of a phone
NOTE_LINE_CHARS, NOTE_LINE_INCHES = 98, 0.135
STYLE: Any = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same everywhere
    "font.size": 9,
    "text.color": TEXT_COLOR,
    "axes.labelcolor": TEXT_COLOR,
    "axes.edgecolor": "#c9c9cf",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "axes.titlepad": 8,
    "xtick.color": "#c9c9cf",
    "ytick.color": "#c9c9cf",
    "xtick.labelcolor": MUTED_COLOR,
    "ytick.labelcolor": MUTED_COLOR,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "text.parse_math": False,  # a name with two dollar signs is a name
}
with_plot_style = matplotlib.rc_context(STYLE)
"""Decorator for functions that plot: text takes its font from the style that is active when it is set."""


class PanelFigure:
    """A figure of stacked panels (heights and margins in inches) over a note in small type; `axes` are the panels."""

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
        lines = [line for part in note.split("\n") if part for line in textwrap.wrap(part, NOTE_LINE_CHARS)]
        foot = 0.12 + NOTE_LINE_INCHES * len(lines) if lines else 0.0
        height = foot + sum(above + panel + below for panel in panels)
        self.axes: list[Axes] = []
        self.figure = Figure(figsize=(WIDTH_INCHES, height), dpi=DPI, facecolor="white")
        top = height
        for panel in panels:
            top -= above + panel
            box = (
                left / WIDTH_INCHES,
                top / height,
                (WIDTH_INCHES - left - right) / WIDTH_INCHES,
                panel / height,
            )
            self.axes.append(self.figure.add_axes(box))
            top -= below
        self.figure.text(
            0.12 / WIDTH_INCHES,
            0.09 / height,
            "\n".join(lines),
            fontsize=7,
            color=MUTED_COLOR,
            linespacing=1.32,
        )

    def to_png(self) -> bytes:
        """A PNG 1080 pixels wide in 256 colours; in fewer if the file would be larger than MAX_PNG_BYTES."""
        canvas = FigureCanvasAgg(self.figure)
        canvas.draw()
        picture = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
        data = b""
        for colors in (256, 96, 32):
            buffer = io.BytesIO()
            picture.quantize(colors, dither=Image.Dither.NONE).save(buffer, format="PNG", optimize=True)
            data = buffer.getvalue()
            if len(data) <= MAX_PNG_BYTES:
                break
        return data


def set_panel_title(ax: Axes, title: str, subtitle: str = "") -> None:
    """Set a panel's title at the left and a subtitle (how to read the panel) at the right."""
    ax.set_title(title, loc="left", fontweight="bold", color=TEXT_COLOR)
    ax.set_title(subtitle, loc="right", fontsize=8, color=MUTED_COLOR)
