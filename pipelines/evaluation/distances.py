"""Frechet and kernel distance between sets of photographs: features, crops and formulas."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from models.features import FeatureStack, load_feature_stack
from pipelines.downloads import download
from pipelines.evaluation.metrics import UNFINISHED
from pipelines.recipe import DistanceConfig

DEFAULT_LAYERS = {"efficientnet_lite0": "stage5", "vgg19": "relu3_1"}
"""They have 112 and 256 dimensions: few enough for the number of photographs in a test split."""


FeatureExtractor = Callable[[np.ndarray], np.ndarray]
"""uint8 [m,s,s,3] -> float [m,d]: one feature vector per crop."""


def resolve_layer(distance: DistanceConfig) -> str | None:
    """The configured layer, else the default layer of these features; None if they have no default."""
    return distance.layer or DEFAULT_LAYERS.get(distance.features)


def distance_name(distance: DistanceConfig) -> str:
    """The name under which distances are reported: feature stack and layer."""
    return f"{distance.features}.{resolve_layer(distance) or 'default'}"


@functools.lru_cache(maxsize=2)
def _load_stack(distance: DistanceConfig) -> tuple[FeatureStack, str]:
    """The feature stack and the name of its layer. Raises the errors of load_features and of the download."""
    weights = download(distance.weights, distance.sha256) if distance.weights else None
    stack = load_feature_stack(distance.features, weights, distance.sha256)
    layer = resolve_layer(distance)
    if layer not in stack.layer_channels:
        raise ValueError(
            f"distance.layer: {distance.features} has no layer {layer!r}: {', '.join(stack.layer_channels)}"
        )
    return stack, layer


def feature_dimensions(distance: DistanceConfig) -> int:
    """Number of features per crop."""
    stack, layer = _load_stack(distance)
    return stack.layer_channels[layer]


def load_feature_extractor(distance: DistanceConfig) -> FeatureExtractor:
    """The spatial mean of one layer of a frozen feature stack; crops are not resized."""
    stack, layer = _load_stack(distance)

    def pool(crops: np.ndarray) -> np.ndarray:
        batches = torch.from_numpy(crops).permute(0, 3, 1, 2).split(64)
        with torch.no_grad():
            return torch.cat([stack(b.float() / 255, [layer])[layer].mean((2, 3)) for b in batches]).numpy()

    return pool


def crop_size(images: Sequence[np.ndarray]) -> int:
    """Side of the crops in pixels: three quarters of the smallest side of all photographs [H,W,3]."""
    return max(1, min(min(image.shape[:2]) for image in images) * 3 // 4)


@dataclass(frozen=True)
class CropFeatureExtractor:
    """Features of fixed crops: (seed, index of the photograph) decides where they lie, the same for every method.

    `extractor` None: each process loads the feature stack of `distance` itself, so that this can be sent to a task.
    """

    distance: DistanceConfig
    crop_size: int
    """Side of a crop in pixels."""
    seed: int
    extractor: FeatureExtractor | None = None

    def __call__(self, images: Sequence[np.ndarray], first_index: int) -> np.ndarray:
        """Features float [len(images) * crops, d]. Raises ValueError if a photograph is smaller than a crop."""
        size, crops = self.crop_size, []
        for index, image in enumerate(images, first_index):
            if size > (side := min(image.shape[:2])):
                raise ValueError(f"crops of {size} px do not fit photographs of {side} px")
            rng = np.random.default_rng([self.seed, index])
            for _ in range(self.distance.crops_per_photo):
                top, left = (int(rng.integers(side - size + 1)) for side in image.shape[:2])
                crops.append(image[top : top + size, left : left + size])
        return (self.extractor or load_feature_extractor(self.distance))(np.stack(crops))

    def to_dict(self) -> dict[str, Any]:
        """The entry `distance` of a protocol; its keys keep the order of stored protocols."""
        config = self.distance
        return {
            "features": config.features,
            "layer": resolve_layer(config),
            "crops": config.crops_per_photo,
            "size": self.crop_size,
            "weights": config.weights,
            "sha256": config.sha256,
            "name": distance_name(config),
        }


def distance_metrics(distance: DistanceConfig, real: np.ndarray, fake: np.ndarray | None) -> dict[str, Any]:
    """{"name", "n", "d", "fd", "kid", "kid_std"} of features [n,d]; "reason" in place of unavailable numbers.

    fake None: the method did not complete every photograph.
    """
    entry: dict[str, Any] = {"name": distance_name(distance), "n": len(real), "d": real.shape[1]}
    if fake is None:
        return {**entry, "reason": UNFINISHED}
    try:
        kid, spread = kernel_distance(real, fake)
        return {**entry, "fd": frechet_distance(real, fake), "kid": kid, "kid_std": spread}
    except ValueError as error:
        return {**entry, "reason": str(error)}


def frechet_distance(real: np.ndarray, fake: np.ndarray, least: int | None = None) -> float:
    """Frechet distance of two samples of features [n,d] under the Gaussian assumption; never negative or complex.

    Only on Inception features with their standard weights is it called FID; with others, name the layer. Raises
    ValueError if n < least (default: 2d, as the covariance of fewer samples depends more on n than on the images).
    """
    real, fake = _check_samples(real, fake, least)
    return gaussian_frechet_distance(
        real.mean(0), np.cov(real, rowvar=False), fake.mean(0), np.cov(fake, rowvar=False)
    )


def gaussian_frechet_distance(
    mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray
) -> float:
    """|m_a - m_b|^2 + tr(A + B - 2 (AB)^(1/2)) for means [d] and covariances A, B [d,d].

    tr (AB)^(1/2) = tr (A^(1/2) B A^(1/2))^(1/2), which is symmetric: two real eigendecompositions, with eigenvalues
    that rounding made negative clipped, instead of a matrix square root that may come out complex.
    """
    cov_a, cov_b = np.atleast_2d(cov_a), np.atleast_2d(cov_b)
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0)).sum()
    distance = np.sum((mean_a - mean_b) ** 2) + np.trace(cov_a) + np.trace(cov_b) - 2 * cross
    return max(float(distance), 0.0)


def kernel_distance(
    real: np.ndarray,
    fake: np.ndarray,
    subset_size: int | None = None,
    subset_count: int = 100,
    seed: int = 0,
    least: int | None = None,
) -> tuple[float, float]:
    """KID: (mean, standard deviation) over subsets of the unbiased squared MMD with kernel (x.y / d + 1)^3.

    real and fake are features [n,d]; each subset samples `subset_size` of both without replacement (default: half of
    them, at most 1000; Binkowski et al. 2018). Unbiased, so it may be slightly negative. Raises ValueError if n <
    least (default: 2d).
    """
    real, fake = _check_samples(real, fake, least)
    n = min(len(real), len(fake))
    size = min(n, subset_size or min(1000, max(2, n // 2)))
    rng = np.random.default_rng(seed)
    draws = [
        _squared_mmd(
            real[rng.choice(len(real), size, replace=False)], fake[rng.choice(len(fake), size, replace=False)]
        )
        for _ in range(subset_count)
    ]
    return float(np.mean(draws)), float(np.std(draws))


def _squared_mmd(x: np.ndarray, y: np.ndarray) -> float:
    size, width = x.shape
    xx, yy, xy = (_cube(a @ b.T / width + 1) for a, b in ((x, x), (y, y), (x, y)))
    within = xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)
    return float(within / (size * (size - 1)) - 2 * xy.mean())


def _cube(values: np.ndarray) -> np.ndarray:
    return values * values * values  # ten times faster than values ** 3


def min_samples(dimensions: int) -> int:
    """Samples that a distance needs: with fewer it depends more on their number than on the images."""
    return 2 * dimensions


def _check_samples(
    real: np.ndarray, fake: np.ndarray, least: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    real, fake = np.asarray(real, dtype=np.float64), np.asarray(fake, dtype=np.float64)
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1]:
        raise ValueError(
            f"features {list(real.shape)} and {list(fake.shape)}: give two arrays [n,d] of the same d"
        )
    n, dimensions = min(len(real), len(fake)), real.shape[1]
    if n < (min_samples(dimensions) if least is None else least):
        if least is not None:
            raise ValueError(f"{n} photograph{'s are' if n != 1 else ' is'} too few (at least {least})")
        raise ValueError(
            f"{n} samples are too few for {dimensions} dimensions (at least {min_samples(dimensions)}): "
            "use more photographs or crops, or a layer with fewer channels"
        )
    if not (np.isfinite(real).all() and np.isfinite(fake).all()):
        raise ValueError("features are not finite: a picture or the feature stack holds NaN or infinity")
    return real, fake
