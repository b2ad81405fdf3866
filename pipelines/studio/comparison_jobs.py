"""Jobs of the worker process for comparisons: two versions side by side, and the comparison before a promotion."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.masks import HOLE_AREA_BANDS
from data_prep.uris import path_from_sqlite_url
from pipelines.evaluation.metrics import ALL_COLUMNS, FEATURE_COLUMNS
from pipelines.plots.images import encode_png
from pipelines.registry.model_comparison import Comparison, compare_models
from pipelines.registry.promotion import plan_promotion
from pipelines.registry.version_comparison import ComparisonData, choose_photographs
from pipelines.studio.score_views import PAIRED_COLUMNS, difference_row

if TYPE_CHECKING:
    from pipelines.studio.worker import JobContext

SHOWN_ROWS = 6
"""Photographs that are shown per mask set."""
SET_COLUMNS = [entry for entry in ALL_COLUMNS if entry[1] in ("fd", "kid")]


def compare(
    context: JobContext,
    *,
    a: str,
    b: str,
    photographs: str,
    masks: Sequence[str],
    count: int,
    tracking_uri: str,
    folder: str,
) -> dict[str, Any]:
    """Compare two versions (NAME/VERSION) and write the pictures to `folder` as 0.png, 1.png and so on.

    photographs: `bundled`, or `scored`: those that b was scored on, else the bundled ones; count: at most so many of
    them. Returns what the page shows.
    """
    for model in (a, b):
        _load(context, model)
    data = ComparisonData("bundled", tuple(masks))
    if photographs == "scored":
        database = path_from_sqlite_url(tracking_uri)
        metadata = context.load_model(b).info.extra
        data = choose_photographs(metadata, None, masks, None, database and database.parent)
    comparison = compare_models(
        f"models:/{a}",
        f"models:/{b}",
        images=data.images,
        masks=list(data.masks),
        max_photos=min(count, data.count or count),
        seed=data.seed,
        size=data.size,
        split=data.split,
        grid_rows=SHOWN_ROWS,
        tracking_uri=tracking_uri,
        on_progress=context.progress,
        load=lambda uri: context.load_model(uri.removeprefix("models:/")),
    )
    return {
        "a": a,
        "b": b,
        "photographs": comparison.photographs,
        "size": comparison.size,
        "source": "the bundled photographs"
        if data.images == "bundled"
        else f"the {data.split} photographs of {b}",
        "note": data.note,
        "digests": comparison.protocol.digests,
        "sections": [_section(comparison, mask_set) for mask_set in comparison.evaluation.bands],
        "pictures": _write_pictures(comparison, Path(folder)),
    }


def plan(context: JobContext, *, name: str, version: str, alias: str, tracking_uri: str) -> dict[str, Any]:
    """The plan of a promotion, for the page and for `carry_out`."""
    context.progress(0, 1, "reading the registry")
    made = plan_promotion(
        name,
        version,
        alias,
        tracking_uri=tracking_uri,
        on_progress=context.progress,
        load=lambda uri: _load(context, uri.removeprefix("models:/")),
    )
    return {"plan": made.as_json()}


def _load(context: JobContext, model: str) -> Any:
    if not context.has_model(model):
        context.progress(0, 1, f"loading {model}")
    return context.load_model(model)


def _section(comparison: Comparison, masks: str) -> dict[str, Any]:
    """One mask set: differences by band, and the scores of the whole set of photographs."""
    bands = ["all", *HOLE_AREA_BANDS]
    own = [row for row in comparison.differences if row.masks == masks and row.metric in PAIRED_COLUMNS]
    own = [row for row in own if not row.metric.startswith("tv")]  # no value of it is best
    own.sort(key=lambda row: (bands.index(row.band), list(PAIRED_COLUMNS).index(row.metric)))
    return {
        "masks": masks,
        "rows": [difference_row(row) for row in own],
        "sets": _set_rows(comparison, masks),
        "excluded": max((row.excluded for row in own), default=0),
    }


def _set_rows(comparison: Comparison, masks: str) -> list[dict[str, str]]:
    """FD, KD, FID and so on of both: not paired, so without intervals."""
    rows = []
    evaluation = comparison.evaluation
    scores = [evaluation.set_metrics(method, masks) for method in (comparison.a, comparison.b)]
    for title, metric, digits in (*SET_COLUMNS, *FEATURE_COLUMNS):
        if all(metric in entry for entry in scores):
            values = [entry[metric] for entry in scores]
            rows.append(
                {
                    "metric": title,
                    "a": f"{values[0]:.{digits}f}",
                    "b": f"{values[1]:.{digits}f}",
                    "difference": f"{values[1] - values[0]:+.{digits}f}",
                }
            )
    return rows


def _write_pictures(comparison: Comparison, folder: Path) -> list[dict[str, Any]]:
    """Write the sample pictures; one entry per photograph and mask set: {"title", "cells": [{"title", "index"}]}."""
    folder.mkdir(parents=True, exist_ok=True)
    entries: list[dict[str, Any]] = []
    number = 0
    titles = {comparison.a: "A", comparison.b: "B", "ground truth": "truth", "masked": "hole"}
    for grid in comparison.evaluation.sample_grids():
        for row in grid.rows:
            cells = []
            for title, picture in zip(grid.columns, row, strict=True):
                if picture is not None and title in titles:
                    (folder / f"{number}.png").write_bytes(encode_png(picture))
                    cells.append({"title": titles[title], "index": number})
                    number += 1
            entries.append({"title": grid.title, "cells": cells})
    return entries
