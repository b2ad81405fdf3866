"""Completions of the same photographs, one row per setting; for a sweep over sigma, also the edges."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_prep.canny import canny_edges
from pipelines.evaluation.results import EvaluationResult
from pipelines.plots.images import GAP_PIXELS, Grid, decode_png, edges_image, encode_png, sample_grid
from pipelines.plots.panels import MAX_PNG_BYTES
from pipelines.sweeps.report.drawing import truncate
from pipelines.sweeps.report.statistics import Axis, format_value, scored_groups, varying_axes
from pipelines.sweeps.report.text import format_score, metric_title, metric_unit
from pipelines.sweeps.results import SweepResult, TrialGroup

MAX_ROWS, MAX_SIGMAS = 8, 12  # rows of a strip by setting, by sigma
CELL_SIDES = (144, 128, 112, 96, 80, 64)
TEXT_RGB, MUTED_RGB = (29, 29, 31), (110, 110, 118)


@dataclass(frozen=True)
class SettingSamples:
    """The sample pictures of one setting's evaluation, and the column with its completions."""

    group: TrialGroup
    pictures: dict[str, dict[str, str]]
    """photograph -> column -> key in the evaluation's pictures; for the first kind of masks."""
    evaluation: EvaluationResult
    method: str

    def cell(self, photo: str, column: str) -> np.ndarray | None:
        key = self.pictures.get(photo, {}).get(column)
        return None if key is None else decode_png(self.evaluation.pictures[key])


def completion_strips(
    result: SweepResult, evaluations: Mapping[int, EvaluationResult]
) -> list[tuple[str, str, bytes, str]]:
    """(file name, title, PNG, alternative text) per strip: by sigma if it is swept, by setting if other fields are."""
    axes = varying_axes(result)
    samples = [
        setting
        for group in scored_groups(result, result.metrics[0])
        if (setting := _setting_samples(result, group, evaluations))
    ]
    if not samples:
        return []
    strips = []
    sigma_axis = next((axis for axis in axes if f".{axis.path}".endswith(".edges.sigma")), None)
    note = f"Completions of each setting's first trial; {metric_title(result.metrics[0])} is the mean over its seeds."
    if sigma_axis:
        title = "Edges and completions by sigma"
        alt_text = "edge maps and completions of the same photographs, one row per sigma, below truth and masked input"
        edges = f"{note} Known edges are black, those in the hole blue."
        strips.append(
            (
                "strip-sigma.png",
                title,
                _encode_strip(*_sigma_strip(result, sigma_axis, samples), edges),
                alt_text,
            )
        )
    if not sigma_axis or len(axes) > 1:
        alt_text = "completions of the same photographs, one row per setting, best first"
        png = _encode_strip(*_setting_strip(result, axes, samples), note)
        strips.append(("strip-settings.png", "Completions, best first", png, alt_text))
    return strips


def _setting_samples(
    result: SweepResult, group: TrialGroup, evaluations: Mapping[int, EvaluationResult]
) -> SettingSamples | None:
    """The samples of the setting's first trial, whatever its seed: no choice by appearance. None without samples."""
    evaluation = next((evaluations[t.number] for t in group.trials if t.number in evaluations), None)
    if evaluation is None or not evaluation.samples:
        return None
    masks = next(iter(evaluation.bands))
    pictures = {s["photo"]: s["pictures"] for s in evaluation.samples if s["masks"] == masks}
    methods = [method for method in evaluation.methods if method not in result.baselines] or list(
        evaluation.methods
    )
    return SettingSamples(
        group, pictures, evaluation, result.model if result.model in methods else methods[0]
    )


Label = tuple[str, ...]
GridSection = tuple[Grid, tuple[Label, ...]]


def _sigma_strip(
    result: SweepResult, axis: Axis, samples: Sequence[SettingSamples]
) -> tuple[list[GridSection], int]:
    best: dict[Any, SettingSamples] = {}
    for setting in samples:  # best first: if other fields are swept too, the best setting of each sigma
        best.setdefault(setting.group.values[axis.path], setting)
    settings = sorted(best.items(), key=lambda item: axis.position(item[0]))
    rows = [settings[i] for i in _evenly_spaced(len(settings), MAX_SIGMAS)]
    photos = _choose_photos([setting for _, setting in rows], 3 if len(rows) <= 5 else 2)
    top = (_truth_grid(rows[0][1], photos), (("sigma", metric_title(result.metrics[0])),))
    pairs = tuple(
        tuple(
            cell
            for photo in photos
            for cell in (_edge_cell(setting, photo, value), setting.cell(photo, setting.method))
        )
        for value, setting in rows
    )
    grid = Grid("by sigma", ("edges", "completion") * len(photos), pairs)
    labels = tuple((format_value(value), _group_score(result, setting.group)) for value, setting in rows)
    return [top, (grid, labels)], 84


def _edge_cell(setting: SettingSamples, photo: str, sigma: Any) -> np.ndarray | None:
    """The edges that the model got or generated; for a study of true edges, Canny on the whole photograph."""
    if setting.method in setting.evaluation.protocol.true_edges:
        truth, masked = setting.cell(photo, "ground truth"), setting.cell(photo, "masked")
        if truth is not None and masked is not None:
            hole = (truth != masked).any(2)
            edges = canny_edges(truth, np.median(sigma))  # of several sigmas, the evaluation takes the median
            return edges_image(edges, hole, edges)
    columns = [name for name in setting.pictures.get(photo, {}) if name.startswith("edges")]
    column = f"edges ({setting.method})"
    return setting.cell(photo, column if column in columns else columns[0]) if columns else None


def _setting_strip(
    result: SweepResult, axes: Sequence[Axis], samples: Sequence[SettingSamples]
) -> tuple[list[GridSection], int]:
    """At most MAX_ROWS settings from best to worst, at evenly spaced ranks."""
    ranks = _evenly_spaced(len(samples), MAX_ROWS)
    photos = _choose_photos(samples, 3)
    rows, labels = [], []
    for rank in ranks:
        setting = samples[rank]
        rows.append(tuple(setting.cell(photo, setting.method) for photo in photos))
        values = tuple(
            _short_field(axis.path, format_value(setting.group.values[axis.path])) for axis in axes
        )
        rank_line = (f"rank {rank + 1} of {len(samples)}",) if len(samples) > MAX_ROWS else ()
        score = f"{metric_title(result.metrics[0])} {_group_score(result, setting.group)}"
        labels.append((*(values or ("the recipe as it is",)), score, *rank_line))
    inputs = [
        tuple(samples[0].cell(photo, column) for photo in photos) for column in ("ground truth", "masked")
    ]
    grid = Grid("by setting", ("",) * len(photos), (*inputs, *rows))
    return [(grid, (("ground truth",), ("masked input",), *labels))], 176


def _truth_grid(setting: SettingSamples, photos: Sequence[str]) -> Grid:
    columns = ("ground truth", "masked")
    row = tuple(setting.cell(photo, column) for photo in photos for column in columns)
    return Grid("inputs", columns * len(photos), (row,))


def _choose_photos(samples: Sequence[SettingSamples], max_photos: int) -> list[str]:
    """At most `max_photos` photographs, evenly spaced, of which all settings have pictures."""
    common = [photo for photo in samples[0].pictures if all(photo in setting.pictures for setting in samples)]
    common = common or list(samples[0].pictures)
    return [common[index] for index in _evenly_spaced(len(common), max_photos)]


def _evenly_spaced(count: int, max_count: int) -> list[int]:
    """At most `max_count` of the indices 0 ... count - 1, evenly spaced, with both ends."""
    return [int(i) for i in np.linspace(0, count - 1, min(max_count, count)).round()]


def _short_field(path: str, value: str) -> str:
    """The last part of a field's path and its value; the path is truncated first."""
    value = truncate(value, 18)
    return f"{truncate(path.rpartition('.')[2], max(6, 25 - len(value)))} {value}"


def _group_score(result: SweepResult, group: TrialGroup) -> str:
    return format_score(result.metrics[0], group.mean(result.metrics[0])) + metric_unit(result.metrics[0])


def _encode_strip(sections: Sequence[GridSection], margin: int, note: str) -> bytes:
    """The strip as PNG, with the largest cells that keep it under MAX_PNG_BYTES, with 256 colours if necessary."""
    data = b""
    for side in CELL_SIDES:
        image = _stack_sections(sections, margin, side, note)
        data = encode_png(image)
        if len(data) > MAX_PNG_BYTES:
            buffer = io.BytesIO()
            reduced = Image.fromarray(image).quantize(256, dither=Image.Dither.NONE)
            reduced.save(buffer, format="PNG", optimize=True)
            data = buffer.getvalue()
        if len(data) <= MAX_PNG_BYTES:
            break
    return data


def _stack_sections(sections: Sequence[GridSection], margin: int, side: int, note: str) -> np.ndarray:
    """The grids below each other, with a label left of each row, and the note below."""
    images = [sample_grid(grid, side) for grid, _ in sections]
    width = margin + max(image.shape[1] for image in images)
    lines = textwrap.wrap(note, width // 6)
    height = sum(image.shape[0] for image in images)
    canvas = Image.new("RGB", (width, height + 10 + 15 * len(lines)), "white")
    draw = ImageDraw.Draw(canvas)
    draw.multiline_text(
        (8, height + 2), "\n".join(lines), font=ImageFont.load_default(11), fill=MUTED_RGB, spacing=2
    )
    top = 0
    for image, (grid, labels) in zip(images, sections, strict=True):
        canvas.paste(Image.fromarray(image), (margin, top))
        top += image.shape[0]
        bottom = top
        for row, label in zip(reversed(grid.rows), reversed(labels), strict=True):
            gap, row_height = max(GAP_PIXELS, side // 20), _row_height(row, side)
            bottom -= gap + row_height
            _draw_label(draw, _fit_label(label, row_height // 16), margin, bottom + row_height / 2)
    return np.asarray(canvas)


def _row_height(row: Sequence[np.ndarray | None], side: int) -> int:
    return max(side if c is None else round(c.shape[0] * side / max(c.shape[:2])) for c in row)


def _fit_label(label: Label, max_lines: int) -> Label:
    """The label with at most `max_lines` lines; its last two lines, with the score, stay."""
    return label if len(label) <= max_lines else (*label[: max(1, max_lines - 3)], "…", *label[-2:])


def _draw_label(draw: ImageDraw.ImageDraw, label: Label, margin: int, middle: float) -> None:
    sizes = [17 if i == 0 and len(label[0]) < 8 else 12 for i in range(len(label))]
    y = middle - sum(1.3 * size for size in sizes) / 2
    for i, (text, size) in enumerate(zip(label, sizes, strict=True)):
        font = ImageFont.load_default(size)
        while font.getlength(text) > margin - 8 and len(text) > 4:
            text = text[:-2] + "…" if text.endswith("…") else text[:-1] + "…"
        draw.text(
            (margin - 2, y + 0.65 * size),
            text,
            font=font,
            fill=TEXT_RGB if i == 0 else MUTED_RGB,
            anchor="rm",
        )
        y += 1.3 * size
