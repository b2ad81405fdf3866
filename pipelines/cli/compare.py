"""`inpaint models compare`: a table of paired differences with intervals, and an image of both models' results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipelines.check_masks import FolderProgressCallback, check_masks
from pipelines.cli.predictions import resolve_size
from pipelines.contracts import ProgressCallback
from pipelines.evaluation.comparison import INTERVAL_NOTE, PairedDifference, compare_methods
from pipelines.evaluation.evaluate import evaluate
from pipelines.evaluation.methods import InpaintingMethod
from pipelines.evaluation.metrics import FEATURE_COLUMNS, METRIC_COLUMNS
from pipelines.evaluation.photographs import load_photographs
from pipelines.evaluation.protocol import Protocol
from pipelines.evaluation.results import EvaluationResult, masks_title
from pipelines.plots.images import encode_png, sample_grid
from pipelines.recipe import EvaluationConfig, FeatureWeights
from pipelines.registry.client import find_folder, find_version, registry_client
from pipelines.registry.load import load_model
from pipelines.registry.loaded_model import LoadedModelMethod, largest_training_size


@dataclass(frozen=True)
class Comparison:
    """Two models, a and b, on the same photographs and masks."""

    a: str
    b: str
    """NAME/VERSION, or a checkpoint folder."""
    photographs: int
    size: int
    """Side in pixels of the square crops."""
    protocol: Protocol
    differences: tuple[PairedDifference, ...]
    """b minus a, for each mask set, band and metric."""
    distances: dict[str, dict[str, dict[str, Any]]]
    """mask set -> model -> feature distances (FD, KD) over all photographs."""
    set_scores: dict[str, dict[str, dict[str, Any]]]
    """mask set -> model -> FID, KID, P-IDS and U-IDS, or why there are none; {}: without weights for Inception."""
    picture: str | None
    """Path of the image with both models side by side."""
    text: str
    """The table for a terminal."""

    def as_json(self) -> dict[str, Any]:
        """The output of --json: all fields except `text`."""
        rows = [row.as_json() | {"verdict": row.verdict} for row in self.differences]
        fields = {key: value for key, value in vars(self).items() if key != "text"}
        return fields | {"protocol": self.protocol.to_dict(), "differences": rows}


def compare_models(
    a: str,
    b: str,
    *,
    images: str,
    masks: Sequence[str],
    max_photos: int = 100,
    seed: int = 0,
    size: int | None = None,
    grid_rows: int = 6,
    out: Path | None = None,
    hole: Sequence[str] | None = None,
    features: FeatureWeights | None = None,
    tracking_uri: str | None = None,
    on_masks: FolderProgressCallback | None = None,
    on_progress: ProgressCallback | None = None,
) -> Comparison:
    """Score two models, versions or checkpoint folders, on the same photographs and masks.

    `hole`: the values of the hole in mask folders. `features`: weights for LPIPS, FID and so on. `on_masks` is called
    while mask folders are read, `on_progress` while photographs are scored. ValueError in one line: no such model, both
    the same, no photographs, or a hole that one of the models cannot complete.
    """
    check_masks(masks, hole, on_masks)
    keys = [_model_key(model, tracking_uri) for model in (a, b)]
    if len(set(keys)) < 2:
        raise ValueError(f"{a} and {b} are the same, {keys[0]}: there is nothing to compare")
    key_a, key_b = keys
    models = {
        key: load_model(key if find_folder(model) else f"models:/{key}", tracking_uri=tracking_uri)
        for key, model in zip(keys, (a, b))
    }
    size = resolve_size(size, masks, largest_training_size(models.values()))
    photos = load_photographs(images, size, max_photos)
    methods: dict[str, InpaintingMethod] = {key: LoadedModelMethod(model) for key, model in models.items()}
    config = EvaluationConfig(
        masks=masks, max_photos=None, seed=seed, grid_rows=grid_rows, hole=hole, features=features
    )
    evaluation = evaluate(methods, photos, config, progress=on_progress)
    differences = compare_methods(evaluation, key_a, key_b)
    if out:
        grids = evaluation.sample_grids()
        merged_grid = replace(grids[0], rows=tuple(row for grid in grids for row in grid.rows))
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(encode_png(sample_grid(merged_grid)))
    text = format_comparison(evaluation, differences, key_a, key_b)
    return Comparison(
        a=key_a,
        b=key_b,
        photographs=len(photos),
        size=size,
        protocol=evaluation.protocol,
        differences=tuple(differences),
        distances=evaluation.distances,
        set_scores=evaluation.set_scores,
        picture=str(out) if out else None,
        text=f"{text}\nside by side: {out}" if out else text,
    )


def _model_key(model: str, tracking_uri: str | None) -> str:
    """A checkpoint folder unchanged, a version as NAME/VERSION."""
    if find_folder(model):
        return model
    with registry_client(tracking_uri) as client:
        version = find_version(client, model)
        return f"{version.name}/{version.version}"


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
