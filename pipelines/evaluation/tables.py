"""The tables of an evaluation: as text, as Markdown, and as cells for the HTML report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from data_prep.masks import HOLE_AREA_BANDS
from models.published_weights import PUBLISHED_WEIGHTS, is_published
from pipelines.evaluation.metrics import (
    EDGE_COLUMNS,
    FEATURE_COLUMNS,
    METRIC_COLUMNS,
    UNFINISHED,
    higher_is_better,
)
from pipelines.evaluation.results import EvaluationResult, MethodSummary, masks_title
from pipelines.evaluation.significance import (
    INTERVALS_NOTE,
    TOO_FEW_NOTE,
    WORSE_NOTE,
    MeanStats,
    has_best,
    mean_stats,
)
from pipelines.evaluation.table_rendering import Cell, Table, render_markdown, render_text

BAND_COLUMN = METRIC_COLUMNS[0]
BENCHMARK_KINDS = {
    "lama_thin": "thin",
    "lama_medium": "medium",
    "lama_thick": "thick",
    "mat_small": "small",
    "mat_large": "large",
}


def main_tables(evaluation: EvaluationResult) -> list[Table]:
    """The main table of each mask set: scores of the whole image and of the hole, and the Frechet distance."""
    tables = []
    for masks in evaluation.bands:
        rows = [evaluation.row(method, masks) for method in evaluation.methods]
        stats = mean_stats(evaluation, masks, [metric for _, metric, _ in METRIC_COLUMNS])
        columns = [
            _format_column(
                [row.metrics.get(metric) for row in rows],
                metric,
                decimals,
                [stats.get((row.method, metric)) for row in rows],
            )
            for _, metric, decimals in METRIC_COLUMNS
        ]
        headings = [heading for heading, *_ in METRIC_COLUMNS]
        distances = evaluation.distances.get(masks, {})
        if distances:
            columns.append(_format_column([distances[m].get("fd") for m in evaluation.methods], "fd", 2))
            headings.append("FD")
        tables.append(
            Table(
                masks_title(masks),
                tuple(headings),
                tuple((row.method, tuple(column[i] for column in columns)) for i, row in enumerate(rows)),
                _caption(evaluation, masks),
                (*_notes(evaluation, masks, rows), *_legend(columns)),
            )
        )
    return tables


def band_tables(evaluation: EvaluationResult) -> list[Table]:
    """PSNR inside the hole by hole area, for mask sets with more than one hole-area band: over all masks (named by their
    kind in the benchmarks of LaMa and MAT), then by tenths. For the legend see the main table, which stands above."""
    heading, metric, decimals = BAND_COLUMN
    tables, labels = [], _all_labels(evaluation)
    for masks, bands in evaluation.bands.items():
        bands_present = [band for band in HOLE_AREA_BANDS if band in bands]
        if len(bands_present) > 1:
            columns = []
            for band in ("all", *bands_present):
                means = [evaluation.row(m, masks, band).metrics.get(metric) for m in evaluation.methods]
                stats = mean_stats(evaluation, masks, [metric], band)
                columns.append(
                    _format_column(
                        means, metric, decimals, [stats.get((m, metric)) for m in evaluation.methods]
                    )
                )
            lines = tuple(
                (m, tuple(column[i] for column in columns)) for i, m in enumerate(evaluation.methods)
            )
            counts = ", ".join(f"{bands.count(band)} of {band} %" for band in bands_present)
            caption = f"{heading} by hole area · {masks_title(masks)} · photographs: {counts}"
            tables.append(
                Table(
                    masks_title(masks),
                    (labels.get(masks, "all"), *(f"{band} %" for band in bands_present)),
                    lines,
                    caption,
                    (),
                )
            )
    return tables


def _all_labels(evaluation: EvaluationResult) -> dict[str, str]:
    """Mask set -> the name of its kind in the benchmarks of LaMa and MAT, of which a frozen set may consist too."""
    protocol = evaluation.protocol
    labels = {}
    for masks, source in zip(evaluation.bands, protocol.masks):
        frozen = protocol.frozen_masks.get(source)
        kinds = list(frozen["masks"]) if frozen else [source]
        if len(kinds) == 1 and kinds[0] in BENCHMARK_KINDS:
            labels[masks] = BENCHMARK_KINDS[kinds[0]]
    return labels


def feature_tables(evaluation: EvaluationResult) -> list[Table]:
    """LPIPS, FID, KID, P-IDS and U-IDS of each mask set, as far as their networks have weights."""
    tables = []
    for masks in evaluation.bands if evaluation.protocol.features else ():
        values = {
            row.method: row.metrics | evaluation.set_metrics(row.method, masks)
            for row in (evaluation.row(method, masks) for method in evaluation.methods)
        }
        reasons = _unavailable_scores(evaluation, masks)
        columns = [
            column
            for column in FEATURE_COLUMNS
            if column[1] in reasons or any(column[1] in scores for scores in values.values())
        ]
        heading = {metric: title.removesuffix(" %") for title, metric, _ in FEATURE_COLUMNS}
        by_reason: dict[str, list[str]] = {}
        for metric, reason in reasons.items():
            by_reason.setdefault(reason, []).append(heading[metric])
        notes = [f"{' and '.join(names)} n/a: {reason}" for reason, names in by_reason.items()]
        for network, sha256 in (evaluation.protocol.features or {}).items():
            if not is_published(network, sha256):
                notes.append(
                    f"{PUBLISHED_WEIGHTS[network].title} has other weights than the published ones (sha256 {sha256[:12]}): "
                    "its scores do not compare with those of papers"
                )
        caption = (
            f"Scores on published networks · {masks_title(masks)} · {len(evaluation.photos)} photographs"
        )
        if columns:
            tables.append(_table(evaluation, masks, columns, values, caption, notes))
    return tables


def edge_tables(evaluation: EvaluationResult) -> list[Table]:
    """Precision, recall and F1 of the edges that methods generate in the hole, per mask set; none without such methods."""
    tables = []
    for masks in evaluation.bands:
        rows = [evaluation.row(method, masks) for method in evaluation.methods]
        values = {row.method: row.metrics for row in rows if EDGE_COLUMNS[0][1] in row.metrics}
        caption = f"Generated edges in the hole against Canny's; 1px: within one pixel · {masks_title(masks)}"
        if values:
            tables.append(_table(evaluation, masks, EDGE_COLUMNS, values, caption))
    return tables


def all_tables(evaluation: EvaluationResult) -> list[Table]:
    """All tables, in the order in which they are shown."""
    return [
        *main_tables(evaluation),
        *feature_tables(evaluation),
        *edge_tables(evaluation),
        *band_tables(evaluation),
    ]


def table_text(evaluation: EvaluationResult) -> str:
    """The tables for a terminal of 100 columns; a star marks the best value of a column."""
    return "\n\n".join(render_text(table) for table in all_tables(evaluation))


def table_markdown(evaluation: EvaluationResult) -> str:
    """The tables in Markdown, values right-aligned and the best ones bold."""
    return "\n\n".join(render_markdown(table) for table in all_tables(evaluation))


def _table(
    evaluation: EvaluationResult,
    masks: str,
    columns: Sequence[tuple[str, str, int]],
    values: Mapping[str, Mapping[str, float]],
    caption: str,
    notes: Sequence[str] = (),
) -> Table:
    """A table with one line per method. columns: heading, metric, decimals; values: method -> metric -> score. For the
    legend of intervals and marks see the main table, which stands above."""
    stats = mean_stats(evaluation, masks, [metric for _, metric, _ in columns])
    cells = [
        _format_column(
            [scores.get(metric) for scores in values.values()],
            metric,
            decimals,
            [stats.get((method, metric)) for method in values],
        )
        for _, metric, decimals in columns
    ]
    lines = tuple((method, tuple(column[i] for column in cells)) for i, method in enumerate(values))
    return Table(masks_title(masks), tuple(heading for heading, *_ in columns), lines, caption, tuple(notes))


def _unavailable_scores(evaluation: EvaluationResult, masks: str) -> dict[str, str]:
    """Metric on Inception features -> why there is none of the methods that completed every photograph."""
    reasons: dict[str, str] = {}
    for scores in evaluation.set_scores.get(masks, {}).values():
        for metric, reason in scores["reasons"].items():
            if reason != UNFINISHED:  # which the main table says of the method
                reasons.setdefault(metric, reason)
    return reasons


def _format_column(
    values: Sequence[float | None],
    metric: str,
    decimals: int,
    stats: Sequence[MeanStats | None] | None = None,
) -> list[Cell]:
    """The cells of one column. Cells that print the same as the best value are marked, unless all cells do."""
    texts = ["n/a" if value is None else _format_value(value, decimals) for value in values]
    available = [value for value in values if value is not None]
    best = ""
    if available and len(set(texts)) > 1 and has_best(metric):
        best = _format_value(max(available) if higher_is_better(metric) else min(available), decimals)
    cells = []
    for text, entry in zip(texts, stats or [None] * len(texts), strict=True):
        entry = entry or MeanStats()
        interval = half_width = ""
        if entry.low is not None and entry.high is not None and text != "exact":
            interval = f"{entry.low:.{decimals}f} to {entry.high:.{decimals}f}"
            half_width = f"±{(entry.high - entry.low) / 2:.{decimals}f}"
        is_best = text == best
        cells.append(Cell(text, is_best, entry.is_worse and not is_best, interval, half_width))
    return cells


def _format_value(value: float, decimals: int) -> str:
    return "exact" if math.isinf(value) else f"{value:.{decimals}f}"


def _caption(evaluation: EvaluationResult, masks: str) -> str:
    parts = [masks_title(masks), f"{len(evaluation.photos)} photographs"]
    if "tv_percent" in evaluation.truth:
        parts.append(f"TV of the photographs {evaluation.truth['tv_percent']:.2f} %")
    for entry in list(evaluation.distances.get(masks, {}).values())[:1]:
        parts.append(f"FD {entry['name']}, n = {entry['n']}, d = {entry['d']}")
    parts.append(f"digests: {evaluation.protocol.digests}")
    return " · ".join(parts)


def _notes(evaluation: EvaluationResult, masks: str, rows: Sequence[MethodSummary]) -> tuple[str, ...]:
    notes: dict[str, None] = {}  # an ordered set
    for name in evaluation.protocol.true_edges:
        notes[
            f"{name} gets the true edges of the whole photograph, also those in the hole: this is not inpainting"
        ] = None
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
            known_l1 = row.metrics["l1_percent_known"]
            notes[f"{row.method} changed known pixels: l1 {known_l1:.3f} % there"] = None
    complete = {row.method for row in rows if not row.failed}
    for method, distance in evaluation.distances.get(masks, {}).items():
        if "reason" in distance and method in complete:
            notes[f"FD is n/a: {distance['reason']}"] = None
    return tuple(notes)


def _legend(columns: Sequence[Sequence[Cell]]) -> tuple[str, ...]:
    """What the intervals and marks of a table mean, or why it has none."""
    cells = [cell for column in columns for cell in column]
    if any(cell.interval or cell.worse for cell in cells):
        return INTERVALS_NOTE, WORSE_NOTE
    return () if all(cell.text in ("n/a", "exact") for cell in cells) else (TOO_FEW_NOTE,)
