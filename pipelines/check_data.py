"""Checks, as soon as the shards are made, that they hold what later steps need: before hours of training."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from data_prep.manifest import SPLITS
from data_prep.shards import empty_split_message, split_positions
from data_prep.sources import open_source
from data_prep.storage import open_storage
from pipelines.contracts import ShardOutputs
from pipelines.downloads import is_local
from pipelines.evaluation.metrics import DISTANCE_METRICS, INCEPTION_METRICS
from pipelines.recipe import EvaluationConfig, Recipe

CANDIDATE_FRACTIONS = [round(0.01 * n, 2) for n in range(1, 100)]  # of a split, tried for a suggestion
MAX_HINT_PHOTOS = 100_000  # above it an empty split is not due to chance, and nothing is suggested


@dataclass(frozen=True)
class SplitCheck:
    """Checks the outputs of a recipe's shard step: call it with them.

    `with_evaluation`: whether an evaluation follows. `with_sweep`: whether a sweep comes first.
    """

    recipe: Recipe
    source: str
    with_evaluation: bool = True
    with_sweep: bool = False

    def check_split_fractions(self) -> None:
        """Raise ValueError if a required split has fraction 0, so that it is empty for any number of photographs."""
        for split, field in self.required_splits().items():
            if split != "train" and getattr(self.recipe.data, split) == 0:
                raise ValueError(
                    f"{field} = {split}, which is empty by data.{split} = 0: raise it, as with --set data.{split}=0.1"
                )

    def required_splits(self) -> dict[str, str]:
        """{split that must not be empty: field of the recipe that requires it}."""
        required = {"train": "data"}
        if self.with_sweep and self.recipe.sweep:
            required.setdefault(self.recipe.sweep.split, "sweep.split")
        if self.with_evaluation:
            required.setdefault(self.recipe.evaluate.split, "evaluate.split")
        return required

    def __call__(self, outputs: ShardOutputs) -> str:
        """Warnings about the splits in one line, or "". Raises ValueError if a later step would fail."""
        splits = outputs.splits
        for split in self.required_splits():
            if not splits.get(split):
                hint = self.suggest_fractions(outputs)
                raise ValueError(f"{empty_split_message(split, self.source)} ({hint})")
        return "; ".join(self.warnings(splits))

    def warnings(self, splits: Mapping[str, int]) -> Iterator[str]:
        recipe = self.recipe
        batch_size = max(recipe.train_for(key).batch for key in recipe.models)
        if splits["train"] < batch_size:
            yield (
                f"train holds {splits['train']} photographs, fewer than a batch of {batch_size}: batches repeat them"
            )
        if not splits["val"]:
            yield (
                "val holds none, so validation uses photographs of the training split: "
                "raise data.val for held-out ones"
            )
        if self.with_sweep and recipe.sweep:
            reason = explain_too_few_samples(recipe.evaluate, splits[recipe.sweep.split], recipe.sweep.split)
            metrics = [metric for metric in recipe.sweep.metrics if metric in DISTANCE_METRICS]
            if reason and metrics:
                raise ValueError(f"sweep.metrics: {metrics[0]} cannot be computed here: {reason}")
            too_few = too_few_for_inception(recipe.evaluate, splits[recipe.sweep.split])
            for metric in set(too_few) & set(recipe.sweep.metrics):
                raise ValueError(f"sweep.metrics: {metric} cannot be computed here: {too_few[metric]}")
        if self.with_evaluation:
            split = recipe.evaluate.split
            if reason := explain_too_few_samples(recipe.evaluate, splits[split], split):
                yield f"there will be no fd and no kid: {reason}"
            for metric, text in too_few_for_inception(recipe.evaluate, splits[split]).items():
                yield f"there will be no {metric}: {text}"

    def suggest_fractions(self, outputs: ShardOutputs) -> str:
        """Fractions that give every required split a photograph, as --set options; or that there are none."""
        splits = outputs.splits
        count = sum(splits.values())
        counts = ", ".join(f"{splits[split]} {split}" for split in SPLITS)
        if count > MAX_HINT_PHOTOS:
            return counts
        data, required = self.recipe.data, self.required_splits()
        source = open_source(data.source, data.size, data.root)
        shards = open_storage(self.recipe.storage).subfolder(outputs.folder)
        positions = sorted(split_positions(source, shards))
        for test, val in _candidate_fractions(data.test, data.val):
            new_counts = dict(zip(("test", "val", "train"), _count_splits(positions, test, val), strict=True))
            if all(new_counts[split] for split in required):
                options = _format_settings({"test": test, "val": val}, {"test": data.test, "val": data.val})
                return f"{counts}: with {options} each gets a photograph"
        return f"{counts}: no fractions give each of {' and '.join(required)} a photograph"


def _candidate_fractions(test: float, val: float) -> Iterator[tuple[float, float]]:
    """(test, val): first pairs that change only one of them, then all; each group nearest to the present pair first."""
    one_changed = [(fraction, val) for fraction in CANDIDATE_FRACTIONS]
    one_changed += [(test, fraction) for fraction in CANDIDATE_FRACTIONS]
    for pairs in (one_changed, itertools.product(CANDIDATE_FRACTIONS, CANDIDATE_FRACTIONS)):
        possible = [pair for pair in pairs if sum(pair) < 1]
        yield from sorted(possible, key=lambda pair: abs(pair[0] - test) + abs(pair[1] - val))


def _count_splits(positions: list[float], test: float, val: float) -> tuple[int, int, int]:
    """Photographs in test, val and train, from their sorted split positions in [0,1)."""
    first, second = (bisect.bisect_left(positions, end) for end in (test, test + val))
    return first, second - first, len(positions) - second


def _format_settings(new: Mapping[str, float], current: Mapping[str, float]) -> str:
    return " ".join(
        f"--set data.{split}={value:g}" for split, value in new.items() if value != current[split]
    )


def too_few_for_inception(evaluation: EvaluationConfig, photographs: int) -> dict[str, str]:
    """Metric on FID's Inception v3 -> why so many photographs are too few for it; {} without weights for that network."""
    if evaluation.features is None or evaluation.features.inception is None:
        return {}
    from pipelines.evaluation.feature_scores import min_photographs

    scored = photographs if evaluation.max_photos is None else min(photographs, evaluation.max_photos)
    return {
        metric: f"{scored} photographs are scored, and it takes {min_photographs(metric)}"
        for metric in INCEPTION_METRICS
        if scored < min_photographs(metric)
    }


def explain_too_few_samples(evaluation: EvaluationConfig, photographs: int, split: str) -> str:
    """Why so many photographs are too few for the Fréchet and kernel distances, and what to do; '' if they suffice."""
    distance = evaluation.distance
    if distance is None:
        return ""
    from pipelines.evaluation.distances import distance_name, feature_dimensions, min_samples

    if distance.weights and not is_local(distance.weights, distance.sha256):
        return ""  # a check does not download weights
    try:
        least = min_samples(feature_dimensions(distance))
    except FileNotFoundError:  # missing weights are reported by the evaluation when it loads them
        return ""
    scored = photographs if evaluation.max_photos is None else min(photographs, evaluation.max_photos)
    samples = scored * distance.crops_per_photo
    if samples >= least:
        return ""
    max_photos = math.ceil(least / distance.crops_per_photo)
    if max_photos <= photographs:
        setting = f"max_photos={max_photos}"
    else:
        setting = f"distance.crops_per_photo={math.ceil(least / scored)}"
    return (
        f"{scored} photographs of {split} x {distance.crops_per_photo} crops are {samples} samples, and "
        f"{distance_name(distance)} of {feature_dimensions(distance)} dimensions takes {least}: "
        f"--set evaluate.{setting}, or give more photographs, or --set evaluate.distance=null"
    )
