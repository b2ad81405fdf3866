"""Precision, recall and F1 of generated edges in a hole, against the true ones."""

from __future__ import annotations

import cv2
import numpy as np

EDGE_THRESHOLD = 0.5  # of EdgeConnect's released configuration (EDGE_THRESHOLD)


def edge_scores(predicted: np.ndarray, true: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    """`edge_precision`, `edge_recall` and `edge_f1` in [0,1], and the same with `_1px`, which accept an edge pixel one
    pixel away (diagonals included).

    predicted: float [H,W] in [0,1] (an edge above 0.5) or bool; true: bool [H,W]; mask [H,W], nonzero = hole. Only edge
    pixels in the hole count. If neither has an edge there, all scores are 1; if only one has, all are 0. Empty without
    a hole. Raises ValueError if the sizes differ.
    """
    if not predicted.shape == true.shape == mask.shape:
        raise ValueError(
            f"edges {list(predicted.shape)}, true edges {list(true.shape)} and mask {list(mask.shape)} differ in size"
        )
    hole = mask != 0
    if not hole.any():
        return {}
    ours, truth = (predicted > EDGE_THRESHOLD) & hole, (true > 0) & hole
    scores = {}
    for suffix, near_truth, near_ours in (("", truth, ours), ("_1px", _grown(truth), _grown(ours))):
        precision, recall = (
            _fraction(ours & near_truth, ours, truth),
            _fraction(truth & near_ours, truth, ours),
        )
        total = precision + recall
        scores[f"edge_precision{suffix}"] = precision
        scores[f"edge_recall{suffix}"] = recall
        scores[f"edge_f1{suffix}"] = 2 * precision * recall / total if total else 0.0
    return scores


def _grown(edges: np.ndarray) -> np.ndarray:
    return cv2.dilate(edges.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0


def _fraction(hits: np.ndarray, edges: np.ndarray, others: np.ndarray) -> float:
    """The fraction of edge pixels that are hits; without edges 1 if there are no others either, else 0."""
    count = int(edges.sum())
    return int(hits.sum()) / count if count else float(not others.any())
