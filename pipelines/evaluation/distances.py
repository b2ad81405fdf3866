"""Distances between sets of photographs: which features, on which crops. The formulas are in metrics.py."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from models.features import load_features
from pipelines.evaluation.metrics import frechet_distance, kernel_distance
from pipelines.resources import local_path

DEFAULT_LAYERS = {"efficientnet_lite0": "stage5", "vgg19": "relu3_1"}
"""Of 112 and 256 dimensions: few enough for the photographs that a test split has."""


Pool = Callable[[np.ndarray], np.ndarray]
"""uint8 [m,s,s,3] -> float [m,d]: one feature vector a crop."""


@dataclass(frozen=True)
class DistanceSpec:
    """Frechet and kernel distances on spatially averaged features of one layer, on fixed random crops."""

    features: str = "efficientnet_lite0"
    layer: str | None = None
    """None = DEFAULT_LAYERS'."""
    crops: int = 4
    """Crops a photograph, at places drawn once from the seed and the photograph's number."""
    size: int | None = None
    """Side of a crop in pixels; None = three quarters of the smallest side of the photographs."""
    weights: str | None = None
    sha256: str | None = None

    @property
    def name(self) -> str:
        """What the figures are called by: the feature stack and its layer."""
        return f"{self.features}.{self.layer or DEFAULT_LAYERS.get(self.features, 'default')}"


def pooled_features(spec: DistanceSpec) -> Pool:
    """The spatial mean of one layer of a frozen feature stack, for crops at their own size."""
    weights = local_path(spec.weights, spec.sha256) if spec.weights else None
    stack = load_features(spec.features, weights, spec.sha256)
    layer = spec.layer or DEFAULT_LAYERS.get(spec.features)
    if layer not in stack.layers:
        raise ValueError(f"distance.layer: {spec.features} has no layer {layer!r}: {', '.join(stack.layers)}")

    def pool(crops: np.ndarray) -> np.ndarray:
        batches = torch.from_numpy(crops).permute(0, 3, 1, 2).split(64)
        with torch.no_grad():
            return torch.cat([stack(b.float() / 255, [layer])[layer].mean((2, 3)) for b in batches]).numpy()

    return pool


def settled(distance: DistanceSpec, images: Sequence[np.ndarray]) -> DistanceSpec:
    """The distance with its layer and its crops' size named; ValueError when they do not fit the smallest photograph."""
    smallest = min(min(image.shape[:2]) for image in images)
    size = distance.size or max(1, smallest * 3 // 4)
    if size > smallest:
        raise ValueError(f"distance.size: crops of {size} px do not fit photographs of {smallest} px")
    return replace(distance, size=size, layer=distance.layer or DEFAULT_LAYERS.get(distance.features))


@functools.lru_cache(maxsize=1)
def _kept_features(spec: DistanceSpec) -> Pool:
    """pooled_features, loaded once by a process that is given slice after slice."""
    return pooled_features(spec)


@dataclass(frozen=True)
class CropFeatures:
    """Features of fixed crops: at the same places of a photograph for every method, drawn from (seed, its number).

    `pool` None: the stack that `spec` names, which each process loads for itself; so this may travel to a task.
    """

    spec: DistanceSpec
    seed: int
    pool: Pool | None = None

    def __call__(self, images: Sequence[np.ndarray], start: int) -> np.ndarray:
        """float [len(images) * crops, d] of photographs start, start + 1..."""
        size = self.spec.size
        if size is None:
            raise ValueError("distance.size: not known before the photographs are (see settled)")
        crops = []
        for index, image in enumerate(images, start):
            rng = np.random.default_rng([self.seed, index])
            for _ in range(self.spec.crops):
                top, left = (int(rng.integers(side - size + 1)) for side in image.shape[:2])
                crops.append(image[top : top + size, left : left + size])
        return (self.pool or _kept_features(self.spec))(np.stack(crops))


def distances(spec: DistanceSpec, real: np.ndarray, fake: np.ndarray | None) -> dict[str, Any]:
    """{"name", "n", "d", "fd", "kid", "kid_std"} of features [n,d]; "reason" in place of figures that cannot be had.

    fake None: the method did not complete every photograph.
    """
    entry: dict[str, Any] = {"name": spec.name, "n": len(real), "d": real.shape[1]}
    if fake is None:
        return {**entry, "reason": "not every photograph was completed"}
    try:
        kid, spread = kernel_distance(real, fake)
        return {**entry, "fd": frechet_distance(real, fake), "kid": kid, "kid_std": spread}
    except ValueError as error:
        return {**entry, "reason": str(error)}
