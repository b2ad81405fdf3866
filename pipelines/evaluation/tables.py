"""The table of an evaluation: for a terminal, for Markdown, and as cells for the report."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from pipelines.evaluation.metrics import BANDS, higher_is_better
from pipelines.evaluation.scores import Evaluation, Row, masks_title

COLUMNS = (  # heading, metric, decimals
    ("PSNR hole", "psnr_rgb_hole", 2),
    ("PSNR", "psnr_rgb", 2),
    ("SSIM", "ssim_gauss11_rgb", 4),
    ("l1 %", "l1_percent", 3),
    ("l2 %", "l2_percent", 3),
    ("TV %", "tv_percent", 2),
)
BAND_COLUMN = COLUMNS[0]
NAME_WIDTH = 30
TEXT_WIDTH = 100


@dataclass(frozen=True)
class Cell:
    text: str
    best: bool = False


@dataclass(frozen=True)
class Table:
    """One kind of masks: headings (without the methods' own), method -> cells, a caption and notes in full sentences."""

    title: str
    headings: tuple[str, ...]
    lines: tuple[tuple[str, tuple[Cell, ...]], ...]
    caption: str
    notes: tuple[str, ...]


def tables(evaluation: Evaluation) -> list[Table]:
    """The main table of each kind of masks: the whole picture and the hole, and the Frechet distance."""
    found = []
    for masks in evaluation.bands:
        rows = [evaluation.row(method, masks) for method in evaluation.methods]
        columns = [
            _cells([row.metrics.get(metric) for row in rows], metric, decimals)
            for _, metric, decimals in COLUMNS
        ]
        headings = [heading for heading, *_ in COLUMNS]
        distances = evaluation.distances.get(masks, {})
        if distances:
            columns.append(_cells([distances[m].get("fd") for m in evaluation.methods], "fd", 2))
            headings.append("FD")
        found.append(
            Table(
                masks_title(masks),
                tuple(headings),
                tuple((row.method, tuple(column[i] for column in columns)) for i, row in enumerate(rows)),
                _caption(evaluation, masks),
                _notes(evaluation, masks, rows),
            )
        )
    return found


def band_tables(evaluation: Evaluation) -> list[Table]:
    """PSNR inside the hole by hole area, for masks that fall in more than one band."""
    heading, metric, decimals = BAND_COLUMN
    found = []
    for masks, bands in evaluation.bands.items():
        present = [band for band in BANDS if band in bands]
        if len(present) > 1:
            columns = [
                _cells(
                    [evaluation.row(m, masks, band).metrics.get(metric) for m in evaluation.methods],
                    metric,
                    decimals,
                )
                for band in present
            ]
            lines = tuple(
                (m, tuple(column[i] for column in columns)) for i, m in enumerate(evaluation.methods)
            )
            counts = ", ".join(f"{bands.count(band)} of {band} %" for band in present)
            caption = f"{heading} by hole area · {masks_title(masks)} · photographs: {counts}"
            found.append(
                Table(masks_title(masks), tuple(f"{band} %" for band in present), lines, caption, ())
            )
    return found


def table_text(evaluation: Evaluation) -> str:
    """The tables for a terminal of 100 columns; the best figure of a column carries a star."""
    return "\n\n".join(_text(table) for table in [*tables(evaluation), *band_tables(evaluation)])


def table_markdown(evaluation: Evaluation) -> str:
    """The tables in Markdown, figures to the right and the best ones bold."""
    return "\n\n".join(_markdown(table) for table in [*tables(evaluation), *band_tables(evaluation)])


def _cells(values: Sequence[float | None], metric: str, decimals: int) -> list[Cell]:
    """Cells of one column; those that print like its best value are best, unless all do.

    There is no best total variation: a smooth fill has less than the photograph.
    """
    texts = ["n/a" if value is None else _figure(value, decimals) for value in values]
    known = [value for value in values if value is not None]
    if not known or len(set(texts)) == 1 or metric.startswith("tv"):
        return [Cell(text) for text in texts]
    best = _figure(max(known) if higher_is_better(metric) else min(known), decimals)
    return [Cell(text, text == best) for text in texts]


def _figure(value: float, decimals: int) -> str:
    return "exact" if math.isinf(value) else f"{value:.{decimals}f}"


def _caption(evaluation: Evaluation, masks: str) -> str:
    parts = [masks_title(masks), f"{len(evaluation.photos)} photographs"]
    if "tv_percent" in evaluation.truth:
        parts.append(f"TV of the photographs {evaluation.truth['tv_percent']:.2f} %")
    for entry in list(evaluation.distances.get(masks, {}).values())[:1]:
        parts.append(f"FD {entry['name']}, n = {entry['n']}, d = {entry['d']}")
    return " · ".join(parts)


def _notes(evaluation: Evaluation, masks: str, rows: Sequence[Row]) -> tuple[str, ...]:
    notes: dict[str, None] = {}  # a set that keeps its order
    for name in evaluation.protocol.get("true_edges", ()):
        notes[f"{name} paints over the true edges of the whole photograph, the hole's too: no completion"] = (
            None
        )
    for row in rows:
        if row.failed:
            notes[
                f"{row.method} is n/a: {row.failed} of {row.n} photographs not completed ({row.reason})"
            ] = None
        if row.exact:
            count = max(row.exact.values())
            notes[
                f"{row.method}: {count} exact results, whose PSNR is infinite, are left out of its mean PSNR"
            ] = None
        if row.metrics.get("l1_percent_known", 0) > 0:
            notes[f"{row.method} changed known pixels: l1 {row.metrics['l1_percent_known']:.3f} % there"] = (
                None
            )
    complete = {row.method for row in rows if not row.failed}
    reasons = {
        m: e["reason"]
        for m, e in evaluation.distances.get(masks, {}).items()
        if "reason" in e and m in complete
    }
    notes.update({f"FD is n/a: {reason}": None for reason in reasons.values()})
    return tuple(notes)


def _text(table: Table) -> str:
    names = [_short(name) for name, _ in table.lines]
    first = max(map(len, [*names, "method"]))
    widths = [
        max(len(heading), *(len(cells[i].text) for _, cells in table.lines)) + 1
        for i, heading in enumerate(table.headings)
    ]
    head = "method".ljust(first) + "".join(f"  {h.rjust(w - 1)} " for h, w in zip(table.headings, widths))
    lines = [
        name.ljust(first)
        + "".join(f"  {c.text.rjust(w - 1)}{'*' if c.best else ' '}" for c, w in zip(cells, widths))
        for name, (_, cells) in zip(names, table.lines)
    ]
    body = [head, "-" * len(head.rstrip()), *lines]
    caption = textwrap.wrap(table.caption, TEXT_WIDTH)
    notes = [line for note in table.notes for line in textwrap.wrap(note, TEXT_WIDTH, subsequent_indent="  ")]
    return "\n".join(line.rstrip() for line in [*caption, "", *body, *notes])


def _short(name: str) -> str:
    return name if len(name) <= NAME_WIDTH else name[: NAME_WIDTH - 1] + "…"


def _markdown(table: Table) -> str:
    def escaped(text: str) -> str:
        return text.replace("|", "\\|")

    lines = [
        "| method | " + " | ".join(table.headings) + " |",
        "|:--|" + "--:|" * len(table.headings),
        *(
            f"| {escaped(name)} | " + " | ".join(f"**{c.text}**" if c.best else c.text for c in cells) + " |"
            for name, cells in table.lines
        ),
    ]
    notes = "".join(f"\n\n{escaped(note)}." for note in table.notes)
    return f"{table.caption}\n\n" + "\n".join(lines) + notes
