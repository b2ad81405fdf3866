"""Scores as the pages show them: which can be chosen, as points of charts, and as rows of tables."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from data_prep.hole_areas import HOLE_AREA_BANDS
from pipelines.evaluation.comparison import PairedDifference
from pipelines.evaluation.metrics import (
    ALL_COLUMNS,
    DISTANCE_METRICS,
    FEATURE_COLUMNS,
    FEATURE_NETWORKS,
    METRIC_COLUMNS,
    SUMMARY_METRICS,
    higher_is_better,
)
from pipelines.registry.client import RegistryError
from pipelines.registry.searching import split_column
from pipelines.studio.charts import MAX_INTERVALS, BandPanel, BandPoint, VersionPoint
from pipelines.studio.registry_snapshot import ModelSummary, VersionSummary
from pipelines.studio.version_details import StoredScores, stored_scores, version_files

HEADINGS = {metric: heading for heading, metric, _ in ALL_COLUMNS}
DIGITS = {metric: digits for _, metric, digits in ALL_COLUMNS}
PAIRED_COLUMNS = {metric: (title, digits) for title, metric, digits in (*METRIC_COLUMNS, *FEATURE_COLUMNS)}
"""Metric -> heading and decimals, for the metrics that comparisons show."""
PANEL_METRICS = ("psnr_rgb_hole", "ssim_gauss11_rgb", "l1_percent", "lpips_alex", "fid")
"""The metrics that have a chart on a version's page, as far as it was scored in them."""
INTERVAL_SECONDS = 0.25
"""Time for reading intervals of versions for one page; those that were read are kept for the next one."""


@dataclass(frozen=True)
class ScoreChoice:
    """A score that the versions of a model have, as selected on its page."""

    metric: str
    masks: str
    band: str
    """"all": over all photographs."""

    @property
    def column(self) -> str:
        return "/".join(
            part for part in (self.masks, self.band if self.band != "all" else "", self.metric) if part
        )

    @property
    def title(self) -> str:
        band = "" if self.band == "all" else f", holes of {self.band} %"
        return f"{heading(self.metric)}, {self.masks} masks{band}"


@dataclass(frozen=True)
class ScoreOptions:
    """What can be selected: the metrics, mask sets and bands of a model's versions."""

    metrics: tuple[str, ...]
    masks: tuple[str, ...]
    bands: tuple[str, ...]


@dataclass(frozen=True)
class ScoreCell:
    value: float
    low: float | None
    high: float | None
    digits: int


@dataclass(frozen=True)
class ScoreRow:
    """One line of a version's table: a band of a mask set, or an untrained method over all photographs."""

    title: str
    count: int | None
    cells: tuple[ScoreCell | None, ...]
    is_baseline: bool = False


@dataclass(frozen=True)
class ScoreTable:
    masks: str
    headings: tuple[str, ...]
    rows: tuple[ScoreRow, ...]


def heading(metric: str) -> str:
    return HEADINGS.get(metric, metric)


def digits(metric: str) -> int:
    return DIGITS.get(metric, 3)


def score_options(versions: Iterable[VersionSummary]) -> ScoreOptions:
    columns = dict.fromkeys(column for version in versions for column in version.scores)
    parts = [split_column(column) for column in columns]
    known = {metric: index for index, metric in enumerate(HEADINGS)}
    metrics = sorted({part[2] for part in parts}, key=lambda metric: (known.get(metric, len(known)), metric))
    bands = {part[1] for part in parts}
    return ScoreOptions(
        tuple(metrics),
        tuple(dict.fromkeys(part[0] for part in parts)),
        ("all", *(band for band in HOLE_AREA_BANDS if band in bands)),
    )


def choose_score(model: ModelSummary, metric: str, masks: str, band: str) -> ScoreChoice | None:
    """The selected score; what is not among the options is replaced by the main score's. None: there are no scores."""
    options = score_options(model.versions)
    if not options.metrics:
        return None
    main_masks, _, main_metric = split_column(model.main_column or next(iter(_columns(model))))
    return ScoreChoice(
        metric if metric in options.metrics else main_metric,
        masks if masks in options.masks else main_masks,
        band if band in options.bands else "all",
    )


def _columns(model: ModelSummary) -> Iterable[str]:
    return (column for version in model.versions for column in version.scores)


def protocol_of(version: VersionSummary, metric: str) -> str:
    """Scores in this metric are comparable between versions of which this is the same."""
    parts = [version.protocol]
    if metric in DISTANCE_METRICS:
        parts.append(version.distance)
    if metric in FEATURE_NETWORKS:
        parts.append(version.features)
    return "; ".join(parts)


def version_points(
    model: ModelSummary,
    choice: ScoreChoice,
    tracking_uri: str = "",
    storage_uri: str = "",
) -> list[VersionPoint]:
    """The versions that have the score, oldest first; with intervals, as far as they can be read soon, if `tracking_uri`
    is given."""
    scored = [version for version in model.versions if choice.column in version.scores]  # newest first
    reference = protocol_of(scored[0], choice.metric) if scored else ""
    many = len(scored) > MAX_INTERVALS  # their chart shows no intervals
    points: list[VersionPoint] = []
    until = time.monotonic() + INTERVAL_SECONDS
    for version in sorted(scored, key=lambda version: not version.aliases):
        interval = None
        if tracking_uri and (version.aliases or not many) and time.monotonic() < until:
            interval = _interval(version, choice.column, tracking_uri, storage_uri)
        point = VersionPoint(
            version=version.version,
            value=version.scores[choice.column],
            low=interval and interval[0],
            high=interval and interval[1],
            aliases=version.aliases,
            comparable=protocol_of(version, choice.metric) == reference,
            href=f"/models/{quote(version.id)}",
        )
        points.append(point)
    return sorted(points, key=lambda point: int(point.version))


def _interval(
    version: VersionSummary, column: str, tracking_uri: str, storage_uri: str
) -> tuple[float, float] | None:
    try:
        metadata = version_files(tracking_uri, version).metadata
    except RegistryError:  # deleted meanwhile
        return None
    interval = stored_scores(storage_uri, version, metadata).intervals.get(column)
    return (interval.low, interval.high) if interval else None


def band_panels(version: VersionSummary, stored: StoredScores) -> list[tuple[str, list[BandPanel]]]:
    """(mask set, one panel per metric of PANEL_METRICS)."""
    sections = []
    for masks in mask_sets(version):
        panels = []
        for metric in PANEL_METRICS:
            points = []
            for band in _bands(version, masks):
                column = ScoreChoice(metric, masks, band).column
                if column in version.scores:
                    interval = stored.intervals.get(column)
                    points.append(
                        BandPoint(
                            band,
                            version.scores[column],
                            interval.low if interval else None,
                            interval.high if interval else None,
                            stored.counts.get(masks, {}).get(band),
                        )
                    )
            if points:
                panels.append(
                    BandPanel(
                        heading(metric),
                        tuple(points),
                        digits(metric),
                        _baseline_bands(stored.baselines, masks, metric, [point.band for point in points]),
                        higher_is_better(metric),
                    )
                )
        if panels:
            sections.append((masks, panels))
    return sections


def _baseline_bands(
    baselines: Mapping[str, Mapping[str, float]], masks: str, metric: str, bands: Sequence[str]
) -> dict[str, dict[str, float]]:
    columns = {band: ScoreChoice(metric, masks, band).column for band in bands}
    return {
        method: {band: scores[column] for band, column in columns.items() if column in scores}
        for method, scores in baselines.items()
    }


def mask_sets(version: VersionSummary) -> list[str]:
    return list(dict.fromkeys(split_column(column)[0] for column in version.scores))


def _bands(version: VersionSummary, masks: str) -> list[str]:
    """`all`, and the bands if there are several: a single one repeats the means."""
    own = {
        band for column in version.scores for set_name, band, _ in [split_column(column)] if set_name == masks
    }
    bands = [band for band in HOLE_AREA_BANDS if band in own]
    return ["all", *bands] if len(bands) > 1 else ["all"]


def score_tables(version: VersionSummary, stored: StoredScores) -> list[ScoreTable]:
    """One table per mask set: all photographs, the bands, then the untrained methods over all photographs."""
    tables = []
    for masks in mask_sets(version):
        metrics = [
            metric
            for metric in SUMMARY_METRICS
            if any(
                ScoreChoice(metric, masks, band).column in version.scores for band in _bands(version, masks)
            )
        ]
        counts = stored.counts.get(masks, {})
        rows = []
        for band in _bands(version, masks):
            title = "all holes" if band == "all" else f"holes of {band} %"
            cells: list[ScoreCell | None] = []
            for metric in metrics:
                column = ScoreChoice(metric, masks, band).column
                interval = stored.intervals.get(column)
                value = version.scores.get(column)
                cells.append(
                    None
                    if value is None
                    else ScoreCell(
                        value,
                        interval.low if interval else None,
                        interval.high if interval else None,
                        digits(metric),
                    )
                )
            rows.append(ScoreRow(title, counts.get(band), tuple(cells)))
        for method, scores in stored.baselines.items():
            values = [scores.get(f"{masks}/{metric}") for metric in metrics]
            if any(value is not None for value in values):
                cells = [
                    None if value is None else ScoreCell(value, None, None, digits(metric))
                    for value, metric in zip(values, metrics, strict=True)
                ]
                rows.append(ScoreRow(method, None, tuple(cells), is_baseline=True))
        tables.append(ScoreTable(masks, tuple(map(heading, metrics)), tuple(rows)))
    return tables


def compared_scores(a: VersionSummary, b: VersionSummary) -> list[dict[str, Any]]:
    """The stored scores of two versions over all photographs, one dict per mask set and metric that both have."""
    rows = []
    for masks in mask_sets(b):
        for metric in SUMMARY_METRICS:
            column = f"{masks}/{metric}"
            if column in a.scores and column in b.scores:
                rows.append(
                    {
                        "masks": masks,
                        "metric": heading(metric),
                        "a": f"{a.scores[column]:.{digits(metric)}f}",
                        "b": f"{b.scores[column]:.{digits(metric)}f}",
                        "difference": f"{b.scores[column] - a.scores[column]:+.{digits(metric)}f}",
                        "comparable": bool(a.protocol) and protocol_of(a, metric) == protocol_of(b, metric),
                    }
                )
    return rows


def difference_row(row: PairedDifference) -> dict[str, Any]:
    """A paired difference as the page's table shows it."""
    title, digits = PAIRED_COLUMNS.get(row.metric, (row.metric, 3))
    return {
        "masks": row.masks,
        "band": row.band,
        "metric": title,
        "n": row.n,
        "a": f"{row.mean_a:.{digits}f}",
        "b": f"{row.mean_b:.{digits}f}",
        "difference": f"{row.mean_difference:+.{digits}f}",
        "interval": row.interval_text,
        "verdict": row.verdict,
        "excluded": row.excluded,
    }
