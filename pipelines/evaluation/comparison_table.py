"""The comparison of two methods as a table for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from pipelines.evaluation.comparison import INTERVAL_NOTE, PairedDifference
from pipelines.evaluation.metrics import FEATURE_COLUMNS, METRIC_COLUMNS
from pipelines.evaluation.results import EvaluationResult, masks_title


def format_comparison(evaluation: EvaluationResult, rows: Sequence[PairedDifference], a: str, b: str) -> str:
    """A table of 100 columns: the metrics of the main table per band, and the feature distances."""
    lines = [f"A: {a}", f"B: {b}", INTERVAL_NOTE, f"digests: {evaluation.protocol.digests}"]
    for masks in evaluation.bands:
        mask_rows = [row for row in rows if row.masks == masks]
        heading = f"{'hole %':<8}{'n':>5}  {'':<10}{'A':>9}{'B':>9}{'B - A':>10}  {'interval':<22}B is"
        lines += ["", f"{masks_title(masks)}, {len(evaluation.photos)} photographs", heading]
        last_band = ""
        for row, name, digits in _table_rows(mask_rows):
            row_start = " " * 13 if row.band == last_band else f"{row.band:<8}{row.n:>5}"
            values = f"{row.mean_a:>9.{digits}f}{row.mean_b:>9.{digits}f}{row.mean_difference:>+10.{digits}f}"
            lines.append(f"{row_start}  {name:<10}{values}  {row.interval_text:<22}{row.verdict}")
            last_band = row.band
        if excluded := max((row.excluded for row in mask_rows), default=0):
            lines.append(f"{excluded} photographs with an exact result (infinite PSNR) are left out")
        distances = [evaluation.distances.get(masks, {}).get(method, {}) for method in (a, b)]
        if all("fd" in entry for entry in distances):
            value_a, value_b = (f"{entry['fd']:.2f}" for entry in distances)
            lines.append(
                f"Frechet distance on {distances[0]['name']}: A {value_a}, B {value_b} (over all photographs, not paired)"
            )
        elif reason := next((entry["reason"] for entry in distances if "reason" in entry), ""):
            lines.append(f"no Frechet distance: {reason}")
        lines += _set_score_lines(evaluation, masks, a, b)
    return "\n".join(line.rstrip() for line in lines)


def _set_score_lines(evaluation: EvaluationResult, masks: str, a: str, b: str) -> list[str]:
    """FID, KID, P-IDS and U-IDS of both models, one line each, or why there is none."""
    scores_a, scores_b = (evaluation.set_scores.get(masks, {}).get(method, {}) for method in (a, b))
    lines = []
    for heading, metric, digits in FEATURE_COLUMNS if scores_a and scores_b else ():
        if metric in scores_a and metric in scores_b:
            values = f"A {scores_a[metric]:.{digits}f}, B {scores_b[metric]:.{digits}f}"
            lines.append(f"{heading}: {values} (over all photographs, not paired)")
        elif reason := scores_a["reasons"].get(metric) or scores_b["reasons"].get(metric):
            lines.append(f"no {heading.removesuffix(' %')}: {reason}")
    return lines


def _table_rows(rows: Sequence[PairedDifference]) -> list[tuple[PairedDifference, str, int]]:
    """(row, heading, decimals) of the main table's metrics by band; without total variation, which has no better."""
    columns = (*METRIC_COLUMNS, *FEATURE_COLUMNS)
    column_index = {
        metric: index for index, (_, metric, _) in enumerate(columns) if not metric.startswith("tv")
    }
    bands = list(dict.fromkeys(row.band for row in rows))
    table_rows = [row for row in rows if row.metric in column_index]
    table_rows.sort(key=lambda row: (bands.index(row.band), column_index[row.metric]))
    return [
        (row, columns[column_index[row.metric]][0], columns[column_index[row.metric]][2])
        for row in table_rows
    ]
