"""Scores of the validation photographs during training."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from skimage.data import astronaut

from data_prep.canny import canny_edges
from pipelines.training.validation_set import ValidationSet
from support.small_models import build_small

SIGMA = 1.0


@pytest.fixture(scope="module")
def validation() -> ValidationSet:
    """Four photographs; the second has no hole."""
    photos = np.stack([astronaut()[y : y + 64, 180:244] for y in (0, 100, 180, 300)])
    masks = np.zeros((4, 64, 64), np.uint8)
    masks[[0, 2, 3], 16:48, 16:48] = 1
    edges = [canny_edges(photo, SIGMA, mask=mask) for photo, mask in zip(photos, masks, strict=True)]
    return ValidationSet(photos, masks, np.stack(edges), SIGMA)


def learner(model: Any) -> Any:
    return SimpleNamespace(model=model, device=torch.device("cpu"), ema_weights=nullcontext)


def test_a_model_that_draws_the_true_edges_has_full_scores(validation: ValidationSet) -> None:
    truth = torch.from_numpy(validation.true_edge)[:, None].float()
    model = SimpleNamespace(visualizations=("edges",), predict_edges=lambda image, mask, edge: truth)
    scores = validation.edge_scores(learner(model))
    assert set(scores.values()) == {1.0}
    assert len(scores) == 6


def test_the_scores_are_over_the_pixels_of_all_holes_together(validation: ValidationSet) -> None:
    model = build_small("edge_connect").eval()
    image = torch.from_numpy(validation.image).permute(0, 3, 1, 2) / 255
    mask, edge = (torch.from_numpy(a)[:, None].float() for a in (validation.mask, validation.edge))
    inside = validation.mask == 1
    drawn = (model.predict_edges(image, mask, edge)[:, 0].numpy() > 0.5) & inside
    true = np.stack([canny_edges(photo, SIGMA) for photo in validation.image]) & inside
    assert drawn.any()
    assert true.any()
    scores = validation.edge_scores(learner(model))
    assert scores["edge_precision"] == (drawn & true).sum() / drawn.sum()
    assert scores["edge_recall"] == (drawn & true).sum() / true.sum()
    assert scores == validation.edge_scores(learner(model))


def test_a_model_that_draws_nothing_scores_zero(validation: ValidationSet) -> None:
    """Also if most of the photographs have no edge in the hole."""
    masks = validation.mask.copy()
    masks[2:] = 0
    flat = np.full_like(validation.image, 100)
    flat[0] = validation.image[0]
    set_with_one_edge = ValidationSet(flat, masks, validation.edge, SIGMA)
    nothing = SimpleNamespace(visualizations=("edges",), predict_edges=lambda image, mask, edge: 0 * mask)
    assert set(set_with_one_edge.edge_scores(learner(nothing)).values()) == {0.0}


def test_edges_have_no_neighbours_in_other_photographs() -> None:
    """The last row of one photograph, and the first of the next."""
    photos, masks = np.zeros((2, 8, 8, 3), np.uint8), np.ones((2, 8, 8), np.uint8)
    photos[1, 4:] = 255
    validation = ValidationSet(photos, masks, np.zeros((2, 8, 8), bool), 0.0)
    drawn, true = np.zeros((2, 8, 8), np.float32), np.zeros((2, 8, 8), bool)
    drawn[0, 7], true[1, 0] = 1, True
    vars(validation)["true_edge"] = true
    model = SimpleNamespace(
        visualizations=("edges",), predict_edges=lambda image, mask, edge: torch.from_numpy(drawn)[:, None]
    )
    assert set(validation.edge_scores(learner(model)).values()) == {0.0}


def test_models_without_an_edge_generator_have_none(validation: ValidationSet) -> None:
    assert validation.edge_scores(learner(build_small("glcic"))) == {}
    assert validation.edge_scores(learner(build_small("edge_connect", edge_input="canny"))) == {}
