"""Strips of a sweep: the same photographs in every row, a row a setting, and for sigma the edges beside them."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_prep.canny import canny_edges
from pipelines.evaluation.figures import GAP, Grid, decode_png, edges_picture, encode_png, sample_grid
from pipelines.evaluation.scores import Evaluation
from pipelines.sweeps.analysis import Axis, figure, heading, scored, shown, unit, varied
from pipelines.sweeps.drawing import LARGEST, clipped
from pipelines.sweeps.result import Group, SweepResult

ROWS, SIGMAS = 8, 12  # at most
SIDES = (144, 128, 112, 96, 80, 64)
INK, SOFT = (29, 29, 31), (110, 110, 118)


@dataclass(frozen=True)
class Shot:
    """One setting's evaluation: its pictures by photograph, and the column that holds its completions."""

    group: Group
    pictures: dict[str, dict[str, str]]
    """photograph -> column -> key of the evaluation's pictures; of the first kind of masks."""
    evaluation: Evaluation
    method: str

    def cell(self, photo: str, column: str) -> np.ndarray | None:
        key = self.pictures.get(photo, {}).get(column)
        return None if key is None else decode_png(self.evaluation.pictures[key])


def strips(result: SweepResult, evaluations: Mapping[int, Evaluation]) -> list[tuple[str, str, bytes, str]]:
    """(file name, title, PNG, what it shows) of a strip by sigma, where it is swept, and of one by setting otherwise."""
    axes = varied(result)
    shots = [
        shot for group in scored(result, result.metrics[0]) if (shot := _shot(result, group, evaluations))
    ]
    if not shots:
        return []
    found = []
    sigma = next((axis for axis in axes if f".{axis.path}".endswith(".edges.sigma")), None)
    note = f"Completions are each setting's first trial's, {heading(result.metrics[0])} is the mean over its seeds."
    if sigma:
        title = "Edges and completions by sigma"
        shows = (
            "edge maps and completions of the same photographs, a row a sigma, below truth and masked input"
        )
        edges = f"{note} Known edges are black, those in the hole blue."
        found.append(("strip-sigma.png", title, _png(*_by_sigma(result, sigma, shots), edges), shows))
    if not sigma or len(axes) > 1:
        shows = "completions of the same photographs, a row a setting, best first"
        png = _png(*_by_setting(result, axes, shots), note)
        found.append(("strip-settings.png", "Completions, best first", png, shows))
    return found


def _shot(result: SweepResult, group: Group, evaluations: Mapping[int, Evaluation]) -> Shot | None:
    """Of the setting's first trial, whichever seed it has: no choice by looks."""
    found = next((evaluations[t.number] for t in group.trials if t.number in evaluations), None)
    if found is None or not found.samples:
        return None
    masks = next(iter(found.bands))
    pictures = {s["photo"]: s["pictures"] for s in found.samples if s["masks"] == masks}
    own = [method for method in found.methods if method not in result.baselines] or list(found.methods)
    return Shot(group, pictures, found, result.model if result.model in own else own[0])


Label = tuple[str, ...]
Part = tuple[Grid, tuple[Label, ...]]


def _by_sigma(result: SweepResult, axis: Axis, shots: Sequence[Shot]) -> tuple[list[Part], int]:
    best: dict[Any, Shot] = {}
    for shot in shots:  # best first: with other fields swept too, the best setting at each sigma
        best.setdefault(shot.group.values[axis.path], shot)
    every = sorted(best.items(), key=lambda item: axis.position(item[0]))
    rows = [every[i] for i in _evenly(len(every), SIGMAS)]
    photos = _photos([shot for _, shot in rows], 3 if len(rows) <= 5 else 2)
    top = (_truth(rows[0][1], photos), (("sigma", heading(result.metrics[0])),))
    pairs = tuple(
        tuple(
            cell for photo in photos for cell in (_edges(shot, photo, value), shot.cell(photo, shot.method))
        )
        for value, shot in rows
    )
    grid = Grid("by sigma", ("edges", "completion") * len(photos), pairs)
    labels = tuple((shown(value), _score(result, shot.group)) for value, shot in rows)
    return [top, (grid, labels)], 84


def _edges(shot: Shot, photo: str, sigma: Any) -> np.ndarray | None:
    """What the model was given or drew: Canny on the whole photograph where it is a study of true edges."""
    if shot.method in shot.evaluation.protocol.get("true_edges", ()):
        truth, masked = shot.cell(photo, "ground truth"), shot.cell(photo, "masked")
        if truth is not None and masked is not None:
            hole = (truth != masked).any(2)
            edges = canny_edges(truth, np.median(sigma))  # of several, evaluation takes the median
            return edges_picture(edges, hole, edges)
    columns = [name for name in shot.pictures.get(photo, {}) if name.startswith("edges")]
    own = f"edges ({shot.method})"
    return shot.cell(photo, own if own in columns else columns[0]) if columns else None


def _by_setting(result: SweepResult, axes: Sequence[Axis], shots: Sequence[Shot]) -> tuple[list[Part], int]:
    """At most ROWS settings, from the best to the worst in even steps of rank."""
    ranks = _evenly(len(shots), ROWS)
    photos = _photos(shots, 3)
    rows, labels = [], []
    for rank in ranks:
        shot = shots[rank]
        rows.append(tuple(shot.cell(photo, shot.method) for photo in photos))
        values = tuple(_field(axis.path, shown(shot.group.values[axis.path])) for axis in axes)
        place = (f"rank {rank + 1} of {len(shots)}",) if len(shots) > ROWS else ()
        score = f"{heading(result.metrics[0])} {_score(result, shot.group)}"
        labels.append((*(values or ("the recipe as it is",)), score, *place))
    given = [tuple(shots[0].cell(photo, column) for photo in photos) for column in ("ground truth", "masked")]
    grid = Grid("by setting", ("",) * len(photos), (*given, *rows))
    return [(grid, (("ground truth",), ("masked input",), *labels))], 176


def _truth(shot: Shot, photos: Sequence[str]) -> Grid:
    columns = ("ground truth", "masked")
    row = tuple(shot.cell(photo, column) for photo in photos for column in columns)
    return Grid("given", columns * len(photos), (row,))


def _photos(shots: Sequence[Shot], most: int) -> list[str]:
    """Evenly spaced ones of those that all settings have pictures of."""
    common = [photo for photo in shots[0].pictures if all(photo in shot.pictures for shot in shots)]
    common = common or list(shots[0].pictures)
    return [common[place] for place in _evenly(len(common), most)]


def _evenly(count: int, most: int) -> list[int]:
    """At most so many of 0, 1... count - 1, evenly spaced, with both ends."""
    return [int(i) for i in np.linspace(0, count - 1, min(most, count)).round()]


def _field(path: str, value: str) -> str:
    """The last word of a field's path and its value, which is the last to be cut."""
    value = clipped(value, 18)
    return f"{clipped(path.rpartition('.')[2], max(6, 25 - len(value)))} {value}"


def _score(result: SweepResult, group: Group) -> str:
    return figure(result.metrics[0], group.mean(result.metrics[0])) + unit(result.metrics[0])


def _png(parts: Sequence[Part], margin: int, note: str) -> bytes:
    """The largest cells with which the picture stays under LARGEST; of 256 colours where all do not fit."""
    data = b""
    for side in SIDES:
        sheet = _stacked(parts, margin, side, note)
        data = encode_png(sheet)
        if len(data) > LARGEST:
            buffer = io.BytesIO()
            few = Image.fromarray(sheet).quantize(256, dither=Image.Dither.NONE)
            few.save(buffer, format="PNG", optimize=True)
            data = buffer.getvalue()
        if len(data) <= LARGEST:
            break
    return data


def _stacked(parts: Sequence[Part], margin: int, side: int, note: str) -> np.ndarray:
    """The grids one below the other, with a label left of each row: its first line large, the others small."""
    sheets = [sample_grid(grid, side) for grid, _ in parts]
    width = margin + max(sheet.shape[1] for sheet in sheets)
    lines = textwrap.wrap(note, width // 6)
    height = sum(sheet.shape[0] for sheet in sheets)
    canvas = Image.new("RGB", (width, height + 10 + 15 * len(lines)), "white")
    draw = ImageDraw.Draw(canvas)
    draw.multiline_text(
        (8, height + 2), "\n".join(lines), font=ImageFont.load_default(11), fill=SOFT, spacing=2
    )
    top = 0
    for sheet, (grid, labels) in zip(sheets, parts, strict=True):
        canvas.paste(Image.fromarray(sheet), (margin, top))
        top += sheet.shape[0]
        bottom = top
        for row, label in zip(reversed(grid.rows), reversed(labels), strict=True):
            gap, tall = max(GAP, side // 20), _height(row, side)
            bottom -= gap + tall
            _write(draw, _fitting(label, tall // 16), margin, bottom + tall / 2)
    return np.asarray(canvas)


def _height(row: Sequence[np.ndarray | None], side: int) -> int:
    return max(side if c is None else round(c.shape[0] * side / max(c.shape[:2])) for c in row)


def _fitting(label: Label, most: int) -> Label:
    """At most so many lines; the last two, of the score, stay."""
    return label if len(label) <= most else (*label[: max(1, most - 3)], "…", *label[-2:])


def _write(draw: ImageDraw.ImageDraw, label: Label, margin: int, middle: float) -> None:
    sizes = [17 if i == 0 and len(label[0]) < 8 else 12 for i in range(len(label))]
    y = middle - sum(1.3 * size for size in sizes) / 2
    for i, (text, size) in enumerate(zip(label, sizes, strict=True)):
        font = ImageFont.load_default(size)
        while font.getlength(text) > margin - 8 and len(text) > 4:
            text = text[:-2] + "…" if text.endswith("…") else text[:-1] + "…"
        draw.text((margin - 2, y + 0.65 * size), text, font=font, fill=INK if i == 0 else SOFT, anchor="rm")
        y += 1.3 * size
