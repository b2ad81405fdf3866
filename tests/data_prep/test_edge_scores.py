"""Edge scores, by hand and against scikit-learn and a direct loop."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import precision_recall_fscore_support

from data_prep.edge_scores import edge_scores


def line(column: int, size: int = 8) -> np.ndarray:
    edges = np.zeros((size, size), bool)
    edges[:, column] = True
    return edges


def hole(size: int = 8) -> np.ndarray:
    mask = np.zeros((size, size), np.uint8)
    mask[2:6, 2:6] = 1
    return mask


def test_a_line_one_pixel_off_is_wrong_exactly_and_right_within_one_pixel() -> None:
    scores = edge_scores(line(3).astype(np.float32), line(4), hole())
    assert scores == {
        **dict.fromkeys(("edge_precision", "edge_recall", "edge_f1"), 0.0),
        **dict.fromkeys(("edge_precision_1px", "edge_recall_1px", "edge_f1_1px"), 1.0),
    }
    assert set(edge_scores(line(2), line(5), hole()).values()) == {0.0}


def test_half_of_the_edges_and_as_many_wrong_ones() -> None:
    predicted = np.zeros((8, 8))
    predicted[2:4, 4] = 0.9  # 2 of the 4 true pixels in the hole
    predicted[2:5, 2] = 0.6  # 3 wrong ones, two columns off
    predicted[5, 5] = 0.5  # not above the threshold
    predicted[:, 7] = 1  # outside the hole
    scores = edge_scores(predicted, line(4), hole())
    assert (scores["edge_precision"], scores["edge_recall"]) == (2 / 5, 2 / 4)
    assert scores["edge_f1"] == pytest.approx(2 * 0.4 * 0.5 / 0.9)
    # within a pixel: row 4 of the true line is next to row 3 of the prediction
    assert (scores["edge_precision_1px"], scores["edge_recall_1px"]) == (2 / 5, 3 / 4)


def test_edges_outside_the_hole_are_no_neighbours() -> None:
    predicted, true = np.zeros((8, 8)), np.zeros((8, 8), bool)
    predicted[3, 2], true[3, 1], true[5, 5] = 1, True, True
    assert set(edge_scores(predicted, true, hole()).values()) == {0.0}


def test_photographs_without_edges_in_the_hole() -> None:
    none, some = np.zeros((8, 8)), line(3)
    assert set(edge_scores(none, none > 0, hole()).values()) == {1.0}
    assert set(edge_scores(none, some, hole()).values()) == {0.0}
    assert set(edge_scores(some, none > 0, hole()).values()) == {0.0}
    assert edge_scores(some, some, np.zeros((8, 8), np.uint8)) == {}


def test_random_edges_against_scikit_learn_and_a_loop() -> None:
    rng = np.random.default_rng(0)
    predicted, true = rng.random((20, 24)), rng.random((20, 24)) > 0.7
    mask = (rng.random((20, 24)) > 0.4).astype(np.uint8)
    scores = edge_scores(predicted, true, mask)
    inside = mask == 1
    expected = precision_recall_fscore_support(true[inside], predicted[inside] > 0.5, average="binary")[:3]
    assert [scores[f"edge_{name}"] for name in ("precision", "recall", "f1")] == pytest.approx(list(expected))

    def near(edges: np.ndarray, y: int, x: int) -> bool:
        return bool(edges[max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2].any())

    ours, truth = (predicted > 0.5) & inside, true & inside
    for name, a, b in (("precision", ours, truth), ("recall", truth, ours)):
        hits = [near(b, y, x) for y, x in zip(*np.nonzero(a), strict=True)]
        assert scores[f"edge_{name}_1px"] == pytest.approx(np.mean(hits))


def test_sizes_must_agree() -> None:
    with pytest.raises(ValueError, match="differ in size"):
        edge_scores(np.zeros((4, 4)), np.zeros((4, 5)), np.zeros((4, 4)))
