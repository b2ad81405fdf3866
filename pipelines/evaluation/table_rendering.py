"""The cells of a table, and the table as text and as Markdown."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

from pipelines.evaluation.significance import WORSE_MARK

MAX_NAME_CHARS = 30
MAX_LINE_CHARS = 100


@dataclass(frozen=True)
class Cell:
    text: str
    best: bool = False
    worse: bool = False
    """Worse than the best of the column by more than chance."""
    interval: str = ""
    """`16.85 to 17.90`; '': there is none."""
    half_width: str = ""
    """Half of the interval's width: `±0.53`."""


@dataclass(frozen=True)
class Table:
    """The table of one mask set: headings (without that of the methods), (method, cells), caption, notes in sentences."""

    title: str
    headings: tuple[str, ...]
    lines: tuple[tuple[str, tuple[Cell, ...]], ...]
    caption: str
    notes: tuple[str, ...]


def render_text(table: Table) -> str:
    """A table for a terminal of MAX_LINE_CHARS columns."""
    names = [_truncate(name) for name, _ in table.lines]
    name_width = max(map(len, [*names, "method"]))
    widths = [
        max(
            len(heading),
            *(len(text) for _, cells in table.lines for text in (cells[i].text, cells[i].half_width)),
        )
        + 1
        for i, heading in enumerate(table.headings)
    ]
    header = "method".ljust(name_width) + "".join(
        f"  {h.rjust(w - 1)} " for h, w in zip(table.headings, widths)
    )
    lines = []
    for name, (_, cells) in zip(names, table.lines):
        marks = ["*" if cell.best else WORSE_MARK if cell.worse else " " for cell in cells]
        texts = "".join(f"  {c.text.rjust(w - 1)}{mark}" for c, w, mark in zip(cells, widths, marks))
        lines.append(name.ljust(name_width) + texts)
        if any(cell.half_width for cell in cells):
            half_widths = "".join(f"  {c.half_width.rjust(w - 1)} " for c, w in zip(cells, widths))
            lines.append(" " * name_width + half_widths)
    body = [header, "-" * len(header.rstrip()), *lines]
    caption = textwrap.wrap(table.caption, MAX_LINE_CHARS)
    notes = [
        line for note in table.notes for line in textwrap.wrap(note, MAX_LINE_CHARS, subsequent_indent="  ")
    ]
    return "\n".join(line.rstrip() for line in [*caption, "", *body, *notes])


def _truncate(name: str) -> str:
    return name if len(name) <= MAX_NAME_CHARS else name[: MAX_NAME_CHARS - 1] + "…"


def render_markdown(table: Table) -> str:
    """A table in Markdown."""

    def escaped(text: str) -> str:
        return text.replace("|", "\\|")

    lines = [
        "| method | " + " | ".join(table.headings) + " |",
        "|:--|" + "--:|" * len(table.headings),
        *(
            f"| {escaped(name)} | " + " | ".join(map(_cell_markdown, cells)) + " |"
            for name, cells in table.lines
        ),
    ]
    notes = "".join(f"\n\n{escaped(note)}." for note in table.notes)
    return f"{table.caption}\n\n" + "\n".join(lines) + notes


def _cell_markdown(cell: Cell) -> str:
    text = f"**{cell.text}**" if cell.best else f"{cell.text}{WORSE_MARK}" if cell.worse else cell.text
    return f"{text} ({cell.interval})" if cell.interval else text
