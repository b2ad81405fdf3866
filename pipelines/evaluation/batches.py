"""The scores of one batch of photographs: a pure function of its arguments, which a Ray task can run anywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data_prep.canny import canny_edges
from data_prep.edge_scores import edge_scores
from data_prep.masks import hole_area_band
from pipelines.errors import error_text
from pipelines.evaluation.feature_scores import FeatureScorer
from pipelines.evaluation.methods import InpaintingMethod
from pipelines.evaluation.metrics import image_metrics, total_variation
from pipelines.plots.images import edges_image, encode_png, masked_image

PhotoFeatureExtractor = Callable[[Sequence[np.ndarray], int], np.ndarray]
"""(photographs uint8 [H,W,3], index of the first) -> float [n,d]."""


@dataclass(frozen=True)
class EvalBatch:
    """Consecutive photographs of an evaluation (uint8 [H,W,3]), and mask set -> their masks (uint8 [H,W])."""

    first_index: int
    images: tuple[np.ndarray, ...]
    masks: dict[str, tuple[np.ndarray, ...]]
    grid_indices: frozenset[int] = frozenset()
    """Indices of the photographs in the sample grids."""
    names: tuple[str, ...] = ()
    """Of the photographs, for methods that look up their results by name."""


@dataclass(frozen=True)
class ScoringConfig:
    """The settings of all batches of an evaluation; plain data unless the extractor holds its own feature stack."""

    default_sigma: float
    """Canny's, for methods without a sigma of their own."""
    feature_extractor: PhotoFeatureExtractor | None = None
    needs_truth_features: bool = True
    """Whether to extract the features of the photographs themselves too."""
    feature_scorer: FeatureScorer | None = None
    """LPIPS, and the Inception features of FID; None: neither."""


@dataclass
class BatchScores:
    """The result of score_batch, in the order of the batch; keys are (mask set, method)."""

    bands: dict[str, list[str]] = field(default_factory=dict)
    scores: dict[tuple[str, str], list[dict[str, float] | str]] = field(default_factory=dict)
    """Per photograph: its scores, or why the method could not complete it."""
    photo_tv: list[float] = field(default_factory=list)
    features: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)
    """[crops, d] of the methods that completed every photograph; those of the ground truth under ("", "")."""
    inception: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)
    """[photographs, 2048] likewise, of the Inception of FID."""
    pictures: dict[tuple[int, str], dict[str, bytes]] = field(default_factory=dict)
    """(index of the photograph, mask set) -> column -> PNG."""


def score_batch(
    methods: Mapping[str, InpaintingMethod], batch: EvalBatch, config: ScoringConfig
) -> BatchScores:
    """Scores, features and pictures of one batch: a pure function."""
    batch_scores, extract = BatchScores(), config.feature_extractor
    batch_scores.photo_tv = [100 * total_variation(image / 255.0) for image in batch.images]
    if extract and config.needs_truth_features:
        batch_scores.features["", ""] = extract(batch.images, batch.first_index)
    scorer = config.feature_scorer
    if scorer and scorer.has_inception:
        batch_scores.inception["", ""] = scorer.inception(batch.images)
    sigmas = {name: getattr(method, "sigma", config.default_sigma) for name, method in methods.items()}
    true_edges = _TrueEdges(batch.images)
    for mask_set, masks in batch.masks.items():
        batch_scores.bands[mask_set] = [hole_area_band(mask) for mask in masks]
        results: dict[str, list[np.ndarray | None]] = {name: [] for name in methods}
        for offset, (image, mask) in enumerate(zip(batch.images, masks, strict=True)):
            known = np.where(mask[..., None] != 0, np.uint8(0), image)
            edges = {s: canny_edges(known, s, mask=mask) for s in set(sigmas.values()) if s is not None}
            lpips = scorer.lpips(image) if scorer else None
            drawn: dict[str, np.ndarray] = {}
            for name, method in methods.items():
                edge = _edges_for(edges, sigmas[name])
                if edge is not None and getattr(method, "uses_true_edges", False):
                    edge = true_edges(offset, sigmas[name] or 0)
                method = _method_for_photo(method, batch.names[offset : offset + 1], mask_set)
                result, drawn_edges, score = _complete_and_score(method, image, known, mask, edge)
                if result is not None and isinstance(score, dict):
                    if lpips:
                        score |= lpips(result)
                    if drawn_edges is not None:
                        drawn[name] = drawn_edges
                        score |= edge_scores(drawn_edges, true_edges(offset, sigmas[name] or 0), mask)
                batch_scores.scores.setdefault((mask_set, name), []).append(score)
                results[name].append(result)
            if batch.first_index + offset in batch.grid_indices:
                diagnostics = _diagnostic_images(methods, known, mask, edges, sigmas, drawn)
                pictures = {"ground truth": image, "masked": masked_image(image, mask), **diagnostics}
                pictures.update({name: r[-1] for name, r in results.items() if r[-1] is not None})
                batch_scores.pictures[batch.first_index + offset, mask_set] = {
                    n: encode_png(p) for n, p in pictures.items()
                }
        for name, completions in results.items():
            completed = [result for result in completions if result is not None]
            if len(completed) == len(completions):
                if extract:
                    batch_scores.features[mask_set, name] = extract(completed, batch.first_index)
                if scorer and scorer.has_inception:
                    batch_scores.inception[mask_set, name] = scorer.inception(completed)
    return batch_scores


def _method_for_photo(method: InpaintingMethod, names: Sequence[str], mask_set: str) -> InpaintingMethod:
    for_photo: Callable[[str, str], InpaintingMethod] | None = getattr(method, "for_photo", None)
    return for_photo(names[0], mask_set) if for_photo and names else method


class _TrueEdges:
    """Canny's edges of the whole photographs of a batch, each computed once."""

    def __init__(self, images: Sequence[np.ndarray]) -> None:
        self.images = images
        self._edges: dict[tuple[int, float], np.ndarray] = {}

    def __call__(self, offset: int, sigma: float) -> np.ndarray:
        """bool [H,W], a copy."""
        if (offset, sigma) not in self._edges:
            self._edges[offset, sigma] = canny_edges(self.images[offset], sigma)
        return self._edges[offset, sigma].copy()


def _complete_and_score(
    method: InpaintingMethod, image: np.ndarray, known: np.ndarray, mask: np.ndarray, edge: np.ndarray | None
) -> tuple[np.ndarray | None, np.ndarray | None, dict[str, float] | str]:
    """The result, the edges [H,W] that the method draws in the hole (None: it draws none), and the scores, or why there
    is no result."""
    arguments = (known.copy(), mask.copy(), edge)
    try:
        drawn: np.ndarray | None = None
        if complete_with_edges := getattr(method, "complete_with_edges", None):
            result, drawn = complete_with_edges(*arguments)
        else:
            result = method(*arguments)
            if predict_edges := getattr(method, "predict_edges", None):
                with suppress(ValueError):  # edges are an extra: the result counts without them
                    drawn = predict_edges(known.copy(), mask.copy(), edge)
        if drawn is not None and drawn.shape != mask.shape:  # of a size that its edge generator rounds
            drawn = None
        return result, drawn, image_metrics(image, result, mask)
    except Exception as error:  # goes into the table, and does not stop the other methods
        return None, None, error_text(error)


def _edges_for(edges: Mapping[float, np.ndarray], sigma: float | None) -> np.ndarray | None:
    return None if sigma is None else edges[sigma].copy()


def _diagnostic_images(
    methods: Mapping[str, InpaintingMethod],
    known: np.ndarray,
    mask: np.ndarray,
    edges: Mapping[float, np.ndarray],
    sigmas: Mapping[str, float | None],
    drawn: Mapping[str, np.ndarray],
) -> dict[str, np.ndarray]:
    """The columns `edges` and `attention`, one for each method that draws them.

    If no method draws edges, `edges` shows the known ones.
    """
    edge_methods = [name for name, method in methods.items() if hasattr(method, "predict_edges")]
    attention_methods = [name for name, method in methods.items() if hasattr(method, "visualize_attention")]
    pictures = {}
    for name in (*edge_methods, *attention_methods):
        method: Any = methods[name]
        kind, same_kind = (
            ("edges", edge_methods) if name in edge_methods else ("attention", attention_methods)
        )
        edge = _edges_for(edges, sigmas[name])
        try:
            if kind == "attention":
                picture = method.visualize_attention(known.copy(), mask.copy(), edge)
            elif name in drawn:
                known_edges = np.zeros(mask.shape, bool) if edge is None else edge
                picture = edges_image(known_edges, mask, drawn[name])
            else:
                continue
        except ValueError:
            continue  # the method cannot complete this hole either, and its scores say so
        pictures[kind if len(same_kind) == 1 else f"{kind} ({name})"] = picture
    if not edge_methods and edges:
        pictures["edges"] = edges_image(edges[min(edges)], mask)
    return pictures


@contextmanager
def single_threaded() -> Iterator[None]:
    """Run torch on one thread, so that every process sums in the same order and gets the same last bits."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
