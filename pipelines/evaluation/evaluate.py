"""Evaluation: one protocol for all models and baselines, on fixed photographs, masks and seeds.

All methods share the masks, the edges and the features of the ground truth, and no method sees the pixels in the hole.
Photographs are scored in batches: a pure function (batches.py) that a Ray task can run anywhere.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from itertools import islice
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from data_prep.frozen_masks import SUFFIX, frozen_sets, is_frozen_set
from data_prep.mask_reading import parse_hole_values
from data_prep.masks import fixed_masks, make_mask_specs
from pipelines.contracts import ProgressCallback
from pipelines.evaluation.batches import BatchScores, EvalBatch, ScoringConfig, score_batch
from pipelines.evaluation.distances import CropFeatureExtractor, FeatureExtractor, crop_size, distance_metrics
from pipelines.evaluation.feature_scores import FeatureScorer, inception_scores, make_scorer
from pipelines.evaluation.methods import InpaintingMethod
from pipelines.evaluation.metrics import METRIC_DEFINITIONS, OPTIONAL_DEFINITIONS
from pipelines.evaluation.protocol import Protocol
from pipelines.evaluation.results import EvaluationResult, ScoreTable
from pipelines.recipe import EvaluationConfig

BATCH_SIZE = 8
SCORED_NOTE = "photographs scored"

BatchRunner = Callable[
    [Mapping[str, InpaintingMethod], Sequence[EvalBatch], ScoringConfig, ProgressCallback],
    Iterable[BatchScores],
]
"""Calls `score_batch` for each batch, anywhere; returns the results in order."""


def run_sequentially(
    methods: Mapping[str, InpaintingMethod],
    batches: Sequence[EvalBatch],
    config: ScoringConfig,
    progress: ProgressCallback,
) -> Iterator[BatchScores]:
    """Score the batches one after another, in this process."""
    total = sum(len(batch.images) for batch in batches)
    for batch in batches:
        scores = score_batch(methods, batch, config)
        progress(batch.first_index + len(batch.images), total, SCORED_NOTE)
        yield scores


def evaluate(
    methods: Mapping[str, InpaintingMethod],
    photos: Iterable[tuple[str, np.ndarray]],
    config: EvaluationConfig,
    *,
    progress: ProgressCallback | None = None,
    extractor: FeatureExtractor | None = None,
    truth_features: np.ndarray | None = None,
    run_batches: BatchRunner = run_sequentially,
) -> EvaluationResult:
    """Score every method on the same photographs (name, uint8 [H,W,3]) and masks.

    A method that cannot complete a hole is listed with the reason; the others are scored all the same. `extractor`
    replaces the feature stack of config.distance; `truth_features` is the result of `extract_truth_features` on the
    same photographs; `run_batches` decides where batches are scored, and changes no bit of the result. Raises
    ValueError without photographs or methods, or if config.hole is not a pixel value; FileNotFoundError if the
    feature weights are missing.
    """
    scorer = make_scorer(config.features)
    if scorer:
        scorer.check()
    # contiguous, as in another process: the order of a sum, and so its last bit, depends on the memory layout
    photographs = [(name, np.ascontiguousarray(image)) for name, image in islice(photos, config.max_photos)]
    if not photographs or not methods:
        raise ValueError(f"nothing to evaluate: {len(photographs)} photographs, {len(methods)} methods")
    images = [image for _, image in photographs]
    feature_extractor = None
    if config.distance:
        feature_extractor = CropFeatureExtractor(config.distance, crop_size(images), config.seed, extractor)
    masks = make_masks(config, images)
    grid_indices = frozenset(
        np.linspace(0, len(images) - 1, min(config.grid_rows, len(images))).round().astype(int).tolist()
    )
    batches = []
    for start in range(0, len(images), BATCH_SIZE):
        indices = slice(start, start + BATCH_SIZE)
        batch_masks = {mask_set: tuple(set_masks[indices]) for mask_set, set_masks in masks.items()}
        names = tuple(name for name, _ in photographs[indices])
        batches.append(EvalBatch(start, tuple(images[indices]), batch_masks, grid_indices, names))
    scoring = ScoringConfig(config.sigma, feature_extractor, truth_features is None, scorer)
    batch_scores = list(
        run_batches(methods, batches, scoring, progress or (lambda done, total, note="": None))
    )
    true_edges = [name for name, method in methods.items() if getattr(method, "uses_true_edges", False)]
    protocol = _make_protocol(config, photographs, masks, feature_extractor, true_edges, scorer)
    return _merge_batches(
        tuple(methods), tuple(name for name, _ in photographs), batch_scores, protocol, config, truth_features
    )


def extract_truth_features(photos: Iterable[tuple[str, np.ndarray]], config: EvaluationConfig) -> np.ndarray:
    """Features float [crops, d] of the photographs themselves, for many evaluations; [0, 0] without a distance."""
    images = [image for _, image in islice(photos, config.max_photos)]
    if not config.distance or not images:
        return np.zeros((0, 0))
    extract = CropFeatureExtractor(config.distance, crop_size(images), config.seed)
    starts = range(0, len(images), BATCH_SIZE)
    return np.concatenate([extract(images[start : start + BATCH_SIZE], start) for start in starts])


def mask_set_names(config: EvaluationConfig) -> list[str]:
    """The names of the mask sets in tables: the last part of a path, of a frozen set without .tar."""
    names = [
        name.removesuffix(SUFFIX) if is_frozen_set(kind) else name
        for kind in config.masks
        for name in [PurePosixPath(kind).name]
    ]
    return names if len(set(names)) == len(names) else list(config.masks)


def make_masks(config: EvaluationConfig, images: Sequence[np.ndarray]) -> dict[str, list[np.ndarray]]:
    """Mask set -> one mask per photograph. The masks of photographs of one size come from one fixed list; of a frozen
    set, photograph i gets mask i. Raises ValueError for a frozen set with too few masks or masks of another size."""
    masks = {}
    for mask_set, kind in zip(
        mask_set_names(config), make_mask_specs(config.masks, config.hole), strict=True
    ):
        sizes = [image.shape[:2] for image in images]
        by_size = {
            (h, w): iter(fixed_masks(kind, h, w, sizes.count((h, w)), config.seed)) for h, w in set(sizes)
        }
        masks[mask_set] = [next(by_size[size]) for size in sizes]
    return masks


def _merge_batches(
    methods: tuple[str, ...],
    names: tuple[str, ...],
    batches: Sequence[BatchScores],
    protocol: Protocol,
    config: EvaluationConfig,
    truth_features: np.ndarray | None,
) -> EvaluationResult:
    bands = {
        mask_set: [band for batch in batches for band in batch.bands[mask_set]]
        for mask_set in batches[0].bands
    }
    values: ScoreTable = {mask_set: {} for mask_set in bands}
    failures: dict[str, dict[str, dict[int, str]]] = {mask_set: {} for mask_set in bands}
    for mask_set in bands:
        for method in methods:
            scores = [score for batch in batches for score in batch.scores[mask_set, method]]
            photo_scores = [{} if isinstance(score, str) else score for score in scores]
            known_metrics = (*METRIC_DEFINITIONS, *OPTIONAL_DEFINITIONS)
            metrics = [name for name in known_metrics if any(name in score for score in photo_scores)]
            values[mask_set][method] = {name: [score.get(name) for score in photo_scores] for name in metrics}
            failed = {i: score for i, score in enumerate(scores) if isinstance(score, str)}
            if failed:
                failures[mask_set][method] = failed
    samples, pictures = [], {}
    for batch in batches:
        for (index, mask_set), columns in batch.pictures.items():
            stem = f"samples/{safe_file_name(mask_set)}-{index:05d}"
            keys = {name: f"{stem}-{i}-{safe_file_name(name)}.png" for i, name in enumerate(columns)}
            pictures.update({keys[name]: png for name, png in columns.items()})
            sample = {
                "photo": names[index],
                "masks": mask_set,
                "band": bands[mask_set][index],
                "pictures": keys,
            }
            samples.append(sample)
    truth = {"tv_percent": float(np.mean([value for batch in batches for value in batch.photo_tv]))}
    distances: dict[str, dict[str, dict[str, Any]]] = {}
    if config.distance:
        if truth_features is None:
            truth_features = np.concatenate([batch.features["", ""] for batch in batches])
        distances = {
            mask_set: {
                name: distance_metrics(
                    config.distance,
                    truth_features,
                    _concatenate([batch.features for batch in batches], mask_set, name),
                )
                for name in methods
            }
            for mask_set in bands
        }
    set_scores = {}
    if ("", "") in batches[0].inception:
        real = np.concatenate([batch.inception["", ""] for batch in batches])
        set_scores = {
            mask_set: {
                name: inception_scores(
                    real, _concatenate([batch.inception for batch in batches], mask_set, name)
                )
                for name in methods
            }
            for mask_set in bands
        }
    return EvaluationResult(
        methods, names, bands, values, failures, distances, truth, protocol, samples, pictures, set_scores
    )


def safe_file_name(name: str) -> str:
    """A name of a method or mask set as part of a file's name."""
    return re.sub(r"[^\w.-]+", "-", name)


def _concatenate(
    batches: Sequence[Mapping[tuple[str, str], np.ndarray]], mask_set: str, method: str
) -> np.ndarray | None:
    """A method's features of all batches; None: it did not complete every photograph."""
    features = [batch[mask_set, method] for batch in batches if (mask_set, method) in batch]
    return np.concatenate(features) if len(features) == len(batches) else None


def _make_protocol(
    config: EvaluationConfig,
    photos: Sequence[tuple[str, np.ndarray]],
    masks: Mapping[str, Sequence[np.ndarray]],
    features: CropFeatureExtractor | None,
    true_edges: Sequence[str],
    scorer: FeatureScorer | None,
) -> Protocol:
    sizes = sorted({f"{image.shape[1]}x{image.shape[0]}" for _, image in photos})
    photo_digest = hashlib.sha256()
    for name, image in photos:
        photo_digest.update(f"{name}\0{image.shape}\0".encode() + image.tobytes())
    mask_digest = hashlib.sha256(b"".join(m.tobytes() for set_masks in masks.values() for m in set_masks))
    packages = ("numpy", "scikit-image", "opencv-python", "pypatchmatch", "torch")
    return Protocol(
        photographs=len(photos),
        sizes=tuple(sizes),
        photographs_sha256=photo_digest.hexdigest(),
        masks=config.masks,
        masks_sha256=mask_digest.hexdigest(),
        seed=config.seed,
        edges=f"Canny outside the hole, sigma {config.sigma:g}",
        hole_contents="black when a method sees them; results are scored as returned",
        mean="over photographs; infinite PSNR of exact results is left out and counted",
        metrics=METRIC_DEFINITIONS,
        bands="hole area in percent, (lo, hi]",
        distance=features.to_dict() if features else None,
        versions={name: version(name) for name in packages},
        true_edges=tuple(true_edges),
        frozen_masks={name: frozen.record() for name, frozen in frozen_sets(config.masks).items()},
        hole=() if config.hole is None else tuple(value.text for value in parse_hole_values(config.hole)),
        features=scorer.to_dict() if scorer else None,
    )
