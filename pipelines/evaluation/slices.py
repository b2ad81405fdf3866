"""The scores of one slice of photographs: a pure function of its arguments, so that any task may run it anywhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from data_prep.canny import canny_edges
from pipelines.errors import in_a_line
from pipelines.evaluation.figures import edges_picture, encode_png, masked_picture
from pipelines.evaluation.metrics import band_of, image_metrics, total_variation

Features = Callable[[Sequence[np.ndarray], int], np.ndarray]
"""(photographs uint8 [H,W,3], number of the first) -> float [n,d]."""


class Completer(Protocol):
    """Completes one photograph: image uint8 [H,W,3] (black in the hole), mask uint8 [H,W] with 1 = hole, edge bool
    [H,W] or None -> uint8 [H,W,3]. It raises ValueError on a hole it cannot complete.

    Four attributes are looked for: `sigma`, at which Canny's edges outside the hole are made for it (None: it takes
    none; not there: the evaluation's sigma); `true_edges`, which asks for those of the whole photograph, the hole's
    too (a study of what perfect edges are worth, no completion); and for the pictures `draw_edges(image, mask, edge)
    -> [H,W]` in [0,1], the edges it draws in the hole, and `draw_attention(image, mask, edge) -> uint8 [H,W,3]`.
    """

    def __call__(self, image: np.ndarray, mask: np.ndarray, edge: np.ndarray | None) -> np.ndarray: ...


@dataclass(frozen=True)
class Slice:
    """Photographs start, start + 1... of an evaluation (uint8 [H,W,3]), and label -> their masks (uint8 [H,W])."""

    start: int
    images: tuple[np.ndarray, ...]
    masks: dict[str, tuple[np.ndarray, ...]]
    shown: frozenset[int] = frozenset()
    """Numbers of the photographs that are kept as pictures."""


@dataclass(frozen=True)
class Terms:
    """What all slices of an evaluation have in common; plain data unless `features` hold a stack of their own."""

    sigma: float | None
    """Canny's, for methods that name none; None = no edges."""
    features: Features | None = None
    truth: bool = True
    """Whether the features of the photographs themselves are wanted."""


@dataclass
class SliceScores:
    """What score_slice found, in the slice's order; keys are (masks, method)."""

    bands: dict[str, list[str]] = field(default_factory=dict)
    scores: dict[tuple[str, str], list[dict[str, float] | str]] = field(default_factory=dict)
    """A photograph's scores, or why the method could not complete it."""
    truth: list[float] = field(default_factory=list)
    features: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)
    """[crops, d] of the methods that completed every photograph; the truth's under ("", "")."""
    pictures: dict[tuple[int, str], dict[str, bytes]] = field(default_factory=dict)
    """(photograph, masks) -> column -> PNG."""


def score_slice(completers: Mapping[str, Completer], piece: Slice, terms: Terms) -> SliceScores:
    """Scores, features and pictures of one slice: a pure function."""
    found, features = SliceScores(), terms.features
    found.truth = [100 * total_variation(image / 255.0) for image in piece.images]
    if features and terms.truth:
        found.features["", ""] = features(piece.images, piece.start)
    sigmas = {name: getattr(method, "sigma", terms.sigma) for name, method in completers.items()}
    for label, masks in piece.masks.items():
        found.bands[label] = [band_of(mask) for mask in masks]
        results: dict[str, list[np.ndarray | None]] = {name: [] for name in completers}
        for offset, (image, mask) in enumerate(zip(piece.images, masks, strict=True)):
            known = np.where(mask[..., None] != 0, np.uint8(0), image)
            edges = {s: canny_edges(known, s, mask=mask) for s in set(sigmas.values()) if s is not None}
            for name, method in completers.items():
                edge = _edge(edges, sigmas[name])
                if edge is not None and getattr(method, "true_edges", False):
                    edge = canny_edges(image, sigmas[name] or 0)
                result, score = _attempt(method, image, known, mask, edge)
                found.scores.setdefault((label, name), []).append(score)
                results[name].append(result)
            if piece.start + offset in piece.shown:
                drawn = _drawings(completers, known, mask, edges, sigmas)
                pictures = {"ground truth": image, "masked": masked_picture(image, mask), **drawn}
                pictures.update({name: r[-1] for name, r in results.items() if r[-1] is not None})
                found.pictures[piece.start + offset, label] = {n: encode_png(p) for n, p in pictures.items()}
        for name, completed in results.items():
            whole = [result for result in completed if result is not None]
            if features and len(whole) == len(completed):
                found.features[label, name] = features(whole, piece.start)
    return found


def _attempt(
    method: Completer, image: np.ndarray, known: np.ndarray, mask: np.ndarray, edge: np.ndarray | None
) -> tuple[np.ndarray | None, dict[str, float] | str]:
    try:
        result = method(known.copy(), mask.copy(), edge)
        return result, image_metrics(image, result, mask)
    except Exception as error:  # a line of the table: neither hidden nor fatal to the other methods
        return None, in_a_line(error)


def _edge(edges: Mapping[float, np.ndarray], sigma: float | None) -> np.ndarray | None:
    return None if sigma is None else edges[sigma].copy()


def _drawings(
    completers: Mapping[str, Completer],
    known: np.ndarray,
    mask: np.ndarray,
    edges: Mapping[float, np.ndarray],
    sigmas: Mapping[str, float | None],
) -> dict[str, np.ndarray]:
    """The `edges` columns, one for each method that draws edges, or the known ones when none does; and `attention`."""
    drawing = [name for name, method in completers.items() if hasattr(method, "draw_edges")]
    attending = [name for name, method in completers.items() if hasattr(method, "draw_attention")]
    pictures = {}
    for name in (*drawing, *attending):
        method: Any = completers[name]
        kind, same = ("edges", drawing) if name in drawing else ("attention", attending)
        edge = _edge(edges, sigmas[name])
        try:
            if kind == "attention":
                picture = method.draw_attention(known.copy(), mask.copy(), edge)
            else:
                outside = np.zeros(mask.shape, bool) if edge is None else edge
                drawn = method.draw_edges(known.copy(), mask.copy(), edge)
                picture = edges_picture(outside, mask, drawn)
        except ValueError:
            continue  # the same hole that it cannot complete, listed there
        pictures[kind if len(same) == 1 else f"{kind} ({name})"] = picture
    if not drawing and edges:
        pictures["edges"] = edges_picture(edges[min(edges)], mask)
    return pictures
