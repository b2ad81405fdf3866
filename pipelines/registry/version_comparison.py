"""Compares a version with the champion on the same photographs and masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.frozen_masks import SHORT_DIGEST, load_frozen_set
from data_prep.manifest import load_manifest
from data_prep.storage import StorageError, open_storage
from pipelines.check_masks import FolderProgressCallback, check_masks
from pipelines.contracts import ProgressCallback
from pipelines.evaluation.comparison import PairedDifference, complete_scores, paired_difference
from pipelines.evaluation.evaluate import evaluate
from pipelines.evaluation.methods import InpaintingMethod
from pipelines.evaluation.photographs import load_photographs
from pipelines.evaluation.protocol import Protocol
from pipelines.evaluation.results import EvaluationResult
from pipelines.recipe import EvaluationConfig
from pipelines.registry.loaded_model import LoadedModel, LoadedModelMethod, largest_training_size
from pipelines.registry.searching import DEFAULT_METRIC
from pipelines.registry.version_record import ScoredOn

MAX_PHOTOGRAPHS = 200


@dataclass(frozen=True)
class ComparisonData:
    """The photographs and masks that two versions are compared on."""

    images: str
    """A folder of photographs or of shards, or `bundled`."""
    masks: tuple[str, ...] = ("center",)
    seed: int = 0
    split: str = "test"
    size: int | None = None
    count: int | None = MAX_PHOTOGRAPHS
    note: str = ""
    """Why the version's own evaluation photographs are not used; '': they are, or others were requested."""
    hole_values: tuple[str, ...] | None = None
    """Pixel values that mark the hole in the images of a mask folder."""

    def __str__(self) -> str:
        return f"{self.images}, {' and '.join(self.masks)} masks"


def choose_photographs(
    metadata: Mapping[str, Any],
    images: str | None,
    masks: Sequence[str],
    hole_values: Sequence[str] | None = None,
    registry_folder: Path | None = None,
) -> ComparisonData:
    """The photographs in `images`, else those that the version was scored on if reachable, else the bundled ones.

    `hole_values` belongs to `masks`. `registry_folder` is the folder of the registry's database file: in a storage that
    was moved, the shards are found relative to it. ValueError: the version was scored on a frozen mask set that is
    missing, damaged or another one now, and `masks` is empty.
    """
    protocol = Protocol.from_record(metadata.get("protocol") or {})
    if not masks:
        _check_frozen_masks(protocol)
    mask_sets = tuple(masks) or protocol.masks or ComparisonData.masks
    seed = int(protocol.seed)
    if not masks and hole_values is None:
        hole_values = protocol.hole
    values = tuple(hole_values) if hole_values else None
    if images:
        return ComparisonData(images, mask_sets, seed, hole_values=values)
    scored_on = ScoredOn.from_record(metadata.get("scored_on"))
    candidates = [scored_on.shards] if scored_on else []
    if scored_on and registry_folder and "/work/" in scored_on.shards:
        candidates.append(str(registry_folder / "work" / scored_on.shards.rpartition("/work/")[2]))
    for shards in candidates:
        with suppress(StorageError, ValueError, OSError):
            if scored_on and load_manifest(open_storage(shards)).digest == scored_on.digest:
                split, size, count = scored_on.split, scored_on.size, scored_on.count
                return ComparisonData(shards, mask_sets, seed, split, size, count, hole_values=values)
    reason = f"{scored_on.shards} is not reachable from here" if scored_on else "its own are not on record"
    note = f"compared on bundled photographs: {reason}"
    return ComparisonData("bundled", mask_sets, seed, note=note, hole_values=values)


def _check_frozen_masks(protocol: Protocol) -> None:
    """Raise ValueError if a frozen set that a version was scored on is gone, or is another one now."""
    for name, record in protocol.frozen_masks.items():
        digest = load_frozen_set(name).manifest.digest
        if digest != record["digest"]:
            raise ValueError(
                f"{name} is not the mask set that the version was scored on (digest {digest[:SHORT_DIGEST]}, then "
                f"{str(record['digest'])[:SHORT_DIGEST]}): restore it, or name other masks with --masks"
            )


def compare_versions(
    old: LoadedModel,
    new: LoadedModel,
    photographs: ComparisonData,
    on_masks: FolderProgressCallback | None = None,
    on_progress: ProgressCallback | None = None,
) -> PairedDifference:
    """The paired difference new - old in the new version's metric. ValueError: it cannot be computed."""
    check_masks(photographs.masks, photographs.hole_values, on_masks)
    size = photographs.size or largest_training_size((old, new))
    photos = load_photographs(photographs.images, size, photographs.count, photographs.split)
    config = EvaluationConfig(
        masks=photographs.masks,
        max_photos=None,
        seed=photographs.seed,
        distance=None,
        grid_rows=1,
        hole=photographs.hole_values,
    )
    methods = {"champion": LoadedModelMethod(old), "candidate": LoadedModelMethod(new)}
    evaluation = evaluate(methods, photos, config, progress=on_progress)
    metric = str(new.info.extra.get("metric", DEFAULT_METRIC))
    return metric_difference(evaluation, "champion", evaluation, "candidate", metric)


def champion_difference(
    champion: LoadedModel,
    evaluation: EvaluationResult,
    label: str,
    photos: Sequence[tuple[str, np.ndarray]],
    config: EvaluationConfig,
    metric: str,
) -> PairedDifference:
    """The paired difference method - champion; the champion is scored again on the evaluation's photographs.

    evaluation, label: the evaluation and the method in it. ValueError: see compare_versions.
    """
    methods: dict[str, InpaintingMethod] = {"champion": LoadedModelMethod(champion)}
    return metric_difference(evaluate(methods, photos, config), "champion", evaluation, label, metric)


def metric_difference(
    a: EvaluationResult, old: str, b: EvaluationResult, new: str, metric: str
) -> PairedDifference:
    """The paired difference b[new] - a[old] over all photographs, on the first mask set. ValueError: no common scores, or
    they are scores on other photographs or masks."""
    if reasons := a.protocol.for_metric(metric).differences(b.protocol.for_metric(metric)):
        raise ValueError(f"the scores are not comparable: {', '.join(reasons)}")
    true_edges = {old in a.protocol.true_edges, new in b.protocol.true_edges}
    if len(true_edges) > 1:
        raise ValueError(
            "one of the two paints over true edges: register studies under a name of their own (register_as)"
        )
    masks = next(iter(b.bands))
    first, second = complete_scores(a, old, masks), complete_scores(b, new, masks)
    if metric not in first or metric not in second:
        raise ValueError(f"{metric} is not available for both")
    result = paired_difference(first[metric], second[metric], metric, masks)
    if result is None:
        raise ValueError(f"no photograph has a finite {metric} for both")
    return result
