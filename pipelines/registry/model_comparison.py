"""Two models on the same photographs and masks: paired differences with intervals, and both models' results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipelines.check_masks import FolderProgressCallback, check_masks
from pipelines.contracts import ProgressCallback
from pipelines.evaluation.comparison import PairedDifference, compare_methods
from pipelines.evaluation.comparison_table import format_comparison
from pipelines.evaluation.evaluate import evaluate
from pipelines.evaluation.methods import InpaintingMethod
from pipelines.evaluation.photographs import load_photographs, resolve_size
from pipelines.evaluation.protocol import Protocol
from pipelines.evaluation.results import EvaluationResult
from pipelines.plots.images import encode_png, sample_grid
from pipelines.recipe import EvaluationConfig, FeatureWeights
from pipelines.registry.client import find_folder, find_version, registry_client
from pipelines.registry.load import load_model
from pipelines.registry.loaded_model import LoadedModel, LoadedModelMethod, largest_training_size


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
    evaluation: EvaluationResult = field(repr=False)
    """The scores and pictures behind the table; its methods are `a` and `b`."""

    def as_json(self) -> dict[str, Any]:
        """The output of --json: all fields except `text` and `evaluation`."""
        rows = [row.as_json() | {"verdict": row.verdict} for row in self.differences]
        fields = {key: value for key, value in vars(self).items() if key not in ("text", "evaluation")}
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
    split: str = "test",
    grid_rows: int = 6,
    out: Path | None = None,
    hole: Sequence[str] | None = None,
    features: FeatureWeights | None = None,
    tracking_uri: str | None = None,
    on_masks: FolderProgressCallback | None = None,
    on_progress: ProgressCallback | None = None,
    load: Callable[[str], LoadedModel] | None = None,
) -> Comparison:
    """Score two models, versions or checkpoint folders, on the same photographs and masks.

    `split`: of a folder of shards. `hole`: the values of the hole in mask folders. `features`: weights for LPIPS, FID and
    so on. `on_masks` is called while mask folders are read, `on_progress` while photographs are scored. `load` loads a
    model (default: registry.load_model). ValueError in one line: no such model, both the same, no photographs, or a hole
    that one of the models cannot complete.
    """
    check_masks(masks, hole, on_masks)
    keys = [_model_key(model, tracking_uri) for model in (a, b)]
    if len(set(keys)) < 2:
        raise ValueError(f"{a} and {b} are the same, {keys[0]}: there is nothing to compare")
    key_a, key_b = keys
    uris = [key if find_folder(model) else f"models:/{key}" for key, model in zip(keys, (a, b))]
    models = {
        key: load(uri) if load else load_model(uri, tracking_uri=tracking_uri) for key, uri in zip(keys, uris)
    }
    size = resolve_size(size, masks, largest_training_size(models.values()))
    photos = load_photographs(images, size, max_photos, split)
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
        evaluation=evaluation,
    )


def _model_key(model: str, tracking_uri: str | None) -> str:
    """A checkpoint folder unchanged, a version as NAME/VERSION."""
    if find_folder(model):
        return model
    with registry_client(tracking_uri) as client:
        version = find_version(client, model)
        return f"{version.name}/{version.version}"
