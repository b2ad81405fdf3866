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
from data_prep.edge_scores import edge_scores
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


def test_the_scores_are_the_means_over_the_photographs_with_a_hole(validation: ValidationSet) -> None:
    model = build_small("edge_connect").eval()
    image = torch.from_numpy(validation.image).permute(0, 3, 1, 2) / 255
    mask, edge = (torch.from_numpy(a)[:, None].float() for a in (validation.mask, validation.edge))
    drawn = model.predict_edges(image, mask, edge)[:, 0].numpy()
    alone = [
        edge_scores(drawn[i], canny_edges(validation.image[i], SIGMA), validation.mask[i]) for i in (0, 2, 3)
    ]
    scores = validation.edge_scores(learner(model))
    assert scores == {name: pytest.approx(np.mean([photo[name] for photo in alone])) for name in alone[0]}
    assert scores == validation.edge_scores(learner(model))


def test_models_without_an_edge_generator_have_none(validation: ValidationSet) -> None:
    assert validation.edge_scores(learner(build_small("glcic"))) == {}
    assert validation.edge_scores(learner(build_small("edge_connect", edge_input="canny"))) == {}
