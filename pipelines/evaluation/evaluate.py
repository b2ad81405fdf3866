"""Evaluation: one protocol for every model and baseline, on fixed photographs, masks and seeds.

Masks, edges and the truth's features are made once and shared by the methods, and a method is never shown what is in
the hole. The work is cut in slices of photographs, each a pure function (slices.py) that a task can run anywhere.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import version
from itertools import islice
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from data_prep.masks import fixed_masks
from models import classical
from pipelines.evaluation.distances import CropFeatures, DistanceSpec, Pool, distances, settled
from pipelines.evaluation.metrics import DEFINITIONS
from pipelines.evaluation.scores import Evaluation, Values
from pipelines.evaluation.slices import Completer, Slice, SliceScores, Terms, score_slice
from pipelines.evaluation.tables import table_markdown, table_text

__all__ = [
    "Completer",
    "DistanceSpec",
    "Evaluation",
    "EvaluationSpec",
    "baselines",
    "evaluate",
    "in_turn",
    "table_markdown",
    "table_text",
]

SLICE = 8
SCORED = "photographs scored"

Progress = Callable[[int, int, str], None]
"""(photographs done, all of them, what is done)."""
Over = Callable[[Mapping[str, Completer], Sequence[Slice], Terms, Progress], Iterable[SliceScores]]
"""Where slices are scored: `score_slice` of each, in their order."""


@dataclass(frozen=True)
class EvaluationSpec:
    """What is evaluated: kinds or folders of masks, the seed, how many photographs, edges, distance and samples."""

    masks: tuple[str, ...] = ("center",)
    seed: int = 0
    count: int | None = None
    """At most this many photographs, the first ones; None = all."""
    sigma: float | None = 2.0
    """Canny's sigma for the edges outside the hole; None = no edges."""
    distance: DistanceSpec | None = field(default_factory=DistanceSpec)
    samples: int = 6
    """Photographs, evenly spaced, that are kept as pictures for each kind of masks."""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> EvaluationSpec:
        """From a recipe's `evaluate` section as a mapping; fields that are not of an evaluation are passed over."""
        own = {f.name: config[f.name] for f in fields(cls) if f.name in config}
        if isinstance(own.get("distance"), Mapping):
            known = {f.name for f in fields(DistanceSpec)}
            own["distance"] = DistanceSpec(**{k: v for k, v in own["distance"].items() if k in known})
        return cls(**{**own, "masks": tuple(own.get("masks", cls.masks))})


@dataclass(frozen=True)
class Baseline:
    """A method that is not trained: models.classical's, or `mean_colour`, the known pixels' mean: the floor."""

    method: str
    sigma = None

    def __call__(self, image: np.ndarray, mask: np.ndarray, edge: np.ndarray | None) -> np.ndarray:
        if self.method != "mean_colour":
            return classical.inpaint(image, mask, self.method)
        known = mask == 0
        if not known.any():
            raise ValueError("the mask covers the whole photograph: no known pixel to take a mean of")
        return np.where(known[..., None], image, image[known].mean(0).round().astype(np.uint8))


def baselines() -> dict[str, Completer]:
    """The methods that every table holds."""
    return {method: Baseline(method) for method in (*classical.METHODS, "mean_colour")}


def in_turn(
    completers: Mapping[str, Completer], pieces: Sequence[Slice], terms: Terms, progress: Progress
) -> Iterator[SliceScores]:
    """The slices one after another, in this process."""
    total = sum(len(piece.images) for piece in pieces)
    for piece in pieces:
        scores = score_slice(completers, piece, terms)
        progress(piece.start + len(piece.images), total, SCORED)
        yield scores


def evaluate(
    completers: Mapping[str, Completer],
    photos: Iterable[tuple[str, np.ndarray]],
    spec: EvaluationSpec,
    *,
    progress: Progress | None = None,
    pool: Pool | None = None,
    truth: np.ndarray | None = None,
    over: Over = in_turn,
) -> Evaluation:
    """Score every completer on the same photographs (name, uint8 [H,W,3]) and masks.

    A method that cannot complete a hole is listed with its reason, and the others go on. `pool` replaces the feature
    stack that spec.distance names; `truth` is what `truth_features` found on the same photographs; `over` is where
    the slices are scored, which changes no bit. ValueError: no photographs or methods, a crop larger than a photograph;
    FileNotFoundError: feature weights that are not there.
    """
    # contiguous, as they arrive in another process: the order of a sum, and so its last bit, follows the layout
    chosen = [(name, np.ascontiguousarray(image)) for name, image in islice(photos, spec.count)]
    if not chosen or not completers:
        raise ValueError(f"nothing to evaluate: {len(chosen)} photographs, {len(completers)} methods")
    images = [image for _, image in chosen]
    features = None
    if spec.distance:
        distance = settled(spec.distance, images)
        spec = replace(spec, distance=distance)
        features = CropFeatures(distance, spec.seed, pool)
    masks = draw_masks(spec, images)
    shown = frozenset(
        np.linspace(0, len(images) - 1, min(spec.samples, len(images))).round().astype(int).tolist()
    )
    pieces = []
    for start in range(0, len(images), SLICE):
        inside = slice(start, start + SLICE)
        of_slice = {label: tuple(drawn[inside]) for label, drawn in masks.items()}
        pieces.append(Slice(start, tuple(images[inside]), of_slice, shown))
    terms = Terms(spec.sigma, features, truth is None)
    parts = list(over(completers, pieces, terms, progress or (lambda done, total, note: None)))
    protocol = _protocol(spec, chosen, masks)
    protocol["true_edges"] = [
        name for name, method in completers.items() if getattr(method, "true_edges", False)
    ]
    return _merge(tuple(completers), tuple(name for name, _ in chosen), parts, protocol, spec, truth)


def truth_features(photos: Iterable[tuple[str, np.ndarray]], spec: EvaluationSpec) -> np.ndarray:
    """float [crops, d] of the photographs themselves, for many evaluations on them; [0, 0] without a distance."""
    images = [image for _, image in islice(photos, spec.count)]
    if not spec.distance or not images:
        return np.zeros((0, 0))
    distance = settled(spec.distance, images)
    features = CropFeatures(distance, spec.seed)
    starts = range(0, len(images), SLICE)
    return np.concatenate([features(images[start : start + SLICE], start) for start in starts])


def draw_masks(spec: EvaluationSpec, images: Sequence[np.ndarray]) -> dict[str, list[np.ndarray]]:
    """label -> a mask for every photograph; photographs of one size share one fixed list."""
    short = [PurePosixPath(kind).name for kind in spec.masks]
    labels = short if len(set(short)) == len(short) else list(spec.masks)
    drawn = {}
    for label, kind in zip(labels, spec.masks, strict=True):
        sizes = [image.shape[:2] for image in images]
        lists = {(h, w): iter(fixed_masks(kind, h, w, sizes.count((h, w)), spec.seed)) for h, w in set(sizes)}
        drawn[label] = [next(lists[size]) for size in sizes]
    return drawn


def _merge(
    methods: tuple[str, ...],
    names: tuple[str, ...],
    parts: Sequence[SliceScores],
    protocol: dict[str, Any],
    spec: EvaluationSpec,
    real: np.ndarray | None,
) -> Evaluation:
    bands = {label: [band for part in parts for band in part.bands[label]] for label in parts[0].bands}
    values: Values = {label: {} for label in bands}
    failures: dict[str, dict[str, dict[int, str]]] = {label: {} for label in bands}
    for label in bands:
        for method in methods:
            scores = [score for part in parts for score in part.scores[label, method]]
            found = [{} if isinstance(score, str) else score for score in scores]
            present = [name for name in DEFINITIONS if any(name in score for score in found)]
            values[label][method] = {name: [score.get(name) for score in found] for name in present}
            failed = {i: score for i, score in enumerate(scores) if isinstance(score, str)}
            if failed:
                failures[label][method] = failed
    samples, pictures = [], {}
    for part in parts:
        for (index, label), columns in part.pictures.items():
            stem = f"samples/{_plain(label)}-{index:05d}"
            keys = {name: f"{stem}-{i}-{_plain(name)}.png" for i, name in enumerate(columns)}
            pictures.update({keys[name]: png for name, png in columns.items()})
            sample = {"photo": names[index], "masks": label, "band": bands[label][index], "pictures": keys}
            samples.append(sample)
    scores_of_truth = {"tv_percent": float(np.mean([value for part in parts for value in part.truth]))}
    apart: dict[str, dict[str, dict[str, Any]]] = {}
    if spec.distance:
        if real is None:
            real = np.concatenate([part.features["", ""] for part in parts])
        apart = {
            label: {name: distances(spec.distance, real, _features(parts, label, name)) for name in methods}
            for label in bands
        }
    return Evaluation(
        methods, names, bands, values, failures, apart, scores_of_truth, protocol, samples, pictures
    )


def _plain(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name)


def _features(parts: Sequence[SliceScores], label: str, method: str) -> np.ndarray | None:
    found = [part.features[label, method] for part in parts if (label, method) in part.features]
    return np.concatenate(found) if len(found) == len(parts) else None


def _protocol(
    spec: EvaluationSpec, photos: Sequence[tuple[str, np.ndarray]], masks: Mapping[str, Sequence[np.ndarray]]
) -> dict[str, Any]:
    sizes = sorted({f"{image.shape[1]}x{image.shape[0]}" for _, image in photos})
    digest = hashlib.sha256()
    for name, image in photos:
        digest.update(f"{name}\0{image.shape}\0".encode() + image.tobytes())
    holes = hashlib.sha256(b"".join(m.tobytes() for drawn in masks.values() for m in drawn))
    packages = ("numpy", "scikit-image", "opencv-python", "pypatchmatch", "torch")
    return {
        "photographs": len(photos),
        "sizes": sizes,
        "photographs_sha256": digest.hexdigest(),
        "masks": list(spec.masks),
        "masks_sha256": holes.hexdigest(),
        "seed": spec.seed,
        "edges": f"Canny outside the hole, sigma {spec.sigma:g}" if spec.sigma is not None else "none",
        "hole_contents": "black when a method sees them; results are scored as returned",
        "mean": "over photographs; infinite PSNR of exact results is left out and counted",
        "metrics": DEFINITIONS,
        "bands": "hole area in percent, (lo, hi]",
        "distance": asdict(spec.distance) | {"name": spec.distance.name} if spec.distance else None,
        "versions": {name: version(name) for name in packages},
    }
