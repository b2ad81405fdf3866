"""Checks of a recipe that need the models, masks and metrics, made before anything runs. They import torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from pipelines.downloads import is_local, with_local_weights
from pipelines.names import did_you_mean
from pipelines.recipe import FeatureWeights, Recipe
from pipelines.recipe.load import RecipeError


def check_recipe(recipe: Recipe, allow_downloads: bool = True) -> None:
    """Check names, options and phases of the models, masks, metrics, and weights of feature stacks.

    Without `allow_downloads`, weights that are not on this machine are not checked. Raises RecipeError in one line.
    """
    from data_prep.masks import check_mask_spec, make_mask_specs
    from pipelines.evaluation.distances import load_feature_extractor

    for key in recipe.models:
        check_model_config(recipe, key, allow_downloads)
    size = recipe.data.size
    for spec in _check("evaluate", make_mask_specs, recipe.evaluate.masks, recipe.evaluate.hole):
        _check("evaluate.masks", check_mask_spec, spec, size)
    _check("evaluate.masks", _check_frozen_counts, recipe)
    _check_features(recipe, allow_downloads)
    check_metric("evaluate.metric", recipe.evaluate.metric, size, features=recipe.evaluate.features)
    distance = recipe.evaluate.distance
    if distance is not None and (
        allow_downloads or not distance.weights or is_local(distance.weights, distance.sha256)
    ):
        _check("evaluate.distance", load_feature_extractor, distance)


def _check_frozen_counts(recipe: Recipe) -> None:
    """Check that a frozen mask set has a mask for every photograph that may be scored: how many there are is known only
    after sharding, and the evaluation would fail after the training."""
    from data_prep.frozen_masks import frozen_sets

    most = recipe.evaluate.max_photos
    for name, frozen in frozen_sets(recipe.evaluate.masks).items():
        count = frozen.manifest.count
        if most is None or most > count:
            allowed = "any number of" if most is None else f"up to {most}"
            raise ValueError(
                f"{name} has {count} masks, and evaluate.max_photos allows {allowed} photographs: set it to {count} or "
                "less, or freeze more masks"
            )


def _check_features(recipe: Recipe, allow_downloads: bool) -> None:
    """Load the networks of evaluate.features; without `allow_downloads` those whose weights are on this machine."""
    from pipelines.evaluation.feature_scores import FeatureScorer

    networks = recipe.evaluate.features.networks if recipe.evaluate.features else {}
    local = {
        name: file
        for name, file in networks.items()
        if allow_downloads or is_local(file.weights, file.sha256)
    }
    _check("evaluate", FeatureScorer(FeatureWeights(**local)).check)


def check_metric(
    field: str,
    metric: str,
    size: int,
    set_metrics: Sequence[str] = (),
    features: FeatureWeights | None = None,
) -> None:
    """Raise RecipeError if `metric` is unknown or cannot be computed on photographs of `size` pixels.

    `set_metrics`: names of metrics of the whole set of photographs, which are allowed too. `features`: the weights of
    the networks of LPIPS.
    """
    import numpy as np

    from models.published_weights import PUBLISHED_WEIGHTS
    from pipelines.evaluation.metrics import (
        FEATURE_NETWORKS,
        LPIPS_METRICS,
        METRIC_DEFINITIONS,
        image_metrics,
    )

    networks = features.networks if features else {}
    if metric in LPIPS_METRICS or metric in set_metrics:
        network = FEATURE_NETWORKS.get(metric)
        if network and network not in networks:
            raise RecipeError(
                f"{field}: {metric} needs the weights of {PUBLISHED_WEIGHTS[network].title}: name their file in "
                f"evaluate.features.{network}"
            )
        return
    known = [*METRIC_DEFINITIONS, *(m for m in LPIPS_METRICS if LPIPS_METRICS[m] in networks), *set_metrics]
    if metric not in known:
        raise RecipeError(f"{field}: no {metric!r} among {', '.join(known)}{did_you_mean(metric, known)}")
    side = min(size, 64)  # larger than the window of any metric
    mask = np.zeros((side, side), np.uint8)
    mask[side // 4 : -side // 4, side // 4 : -side // 4] = 1
    truth = np.full((side, side, 3), 128, np.uint8)
    if metric not in image_metrics(truth, truth, mask):
        raise RecipeError(f"{field}: photographs of {size} px (data.size) are too small for {metric}")


def check_model_config(recipe: Recipe, key: str, allow_downloads: bool = True) -> None:
    """Check one model of the recipe and its training. Raises RecipeError."""
    from data_prep.masks import check_training_masks
    from models import meta_model
    from models.base import make_schedule

    section, train = recipe.models[key], recipe.train_for(key)
    load_weights = allow_downloads or has_local_weights(section.options)
    options = (
        _check(f"models.{key}", with_local_weights, section.options) if load_weights else section.options
    )
    _check_options(key, section.name, options)
    model = _check(f"models.{key}", meta_model, section.name, options)
    model_size = getattr(model.options, "size", recipe.data.size)
    if model_size != recipe.data.size or recipe.data.size % model.size_multiple:
        required = (
            f"{model_size}" if model_size != recipe.data.size else f"a multiple of {model.size_multiple}"
        )
        raise RecipeError(
            f"data.size = {recipe.data.size}: models.{key} ({section.name}) trains on {required} pixels"
        )
    if model.takes_edges and not model.needs_edges and recipe.edges_for(key).mode != "full":
        raise RecipeError(
            f"edges.mode = {recipe.edges_for(key).mode}: models.{key} learns to follow the edges inside the hole, "
            "which only full has"
        )
    phases = [phase.name for phase in model.phases]
    for name in train.steps:
        if name not in phases:
            hint = did_you_mean(name, phases)
            raise RecipeError(f"train.steps.{name}: {section.name} has the phases {', '.join(phases)}{hint}")
    schedule = _check(f"models.{key}", make_schedule, model, train.steps)
    for phase, _, _ in schedule.phase_spans if load_weights else ():
        _check(f"models.{key}", model.load_loss_networks, phase)
    _check("masks", check_training_masks, recipe.masks_for(key), recipe.data.size)


def has_local_weights(options: Mapping[str, Any]) -> bool:
    """Whether the weights of a model's feature stack are on this machine, or it needs none."""
    features = options.get("features")
    weights = features.get("weights") if isinstance(features, Mapping) else None
    return not weights or is_local(weights, features.get("sha256"))  # type: ignore[union-attr]


def _check_options(key: str, name: str, options: Mapping[str, Any]) -> None:
    """Check that numeric options are finite numbers and loss weights not negative: some would fail only in training."""
    from models import options_class

    defaults = {field.name: field.default for field in fields(_check(f"models.{key}", options_class, name))}
    for option, value in options.items():
        default = defaults.get(option)
        if value is None or not isinstance(default, int | float):
            continue
        if isinstance(value, str) or isinstance(value, bool) != isinstance(default, bool):
            kind = "true or false" if isinstance(default, bool) else f"a number, such as {default:g}"
            raise RecipeError(f"models.{key}.{option}: should be {kind} (given: {value!r})")
        if isinstance(value, float) and not math.isfinite(value):
            raise RecipeError(f"models.{key}.{option} = {value:g}: give a finite number")
        if option.startswith("lambda_") and value < 0:
            raise RecipeError(f"models.{key}.{option} = {value:g}: a weight is not negative")


def _check(field: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call the function; its errors become a RecipeError that names the field."""
    try:
        return function(*args, **kwargs)
    except (ValueError, TypeError, OSError) as error:
        raise RecipeError(f"{field}: {error}") from None
