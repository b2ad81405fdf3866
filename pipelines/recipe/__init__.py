"""The typed recipe of a run: read from YAML, frozen, with errors that name the nearest known field."""

from __future__ import annotations

from pipelines.recipe.schema import Recipe
from pipelines.recipe.sections import (
    DistanceConfig,
    EvaluationConfig,
    FeatureWeights,
    Masks,
    ModelConfig,
    Scaling,
    Train,
    WeightsFile,
)
from pipelines.recipe.sweep import Budget, Domain, Sweep

__all__ = [
    "Budget",
    "DistanceConfig",
    "Domain",
    "EvaluationConfig",
    "FeatureWeights",
    "Masks",
    "ModelConfig",
    "Recipe",
    "Scaling",
    "Sweep",
    "Train",
    "WeightsFile",
]
