"""Published scores on frozen networks: LPIPS per photograph; FID, KID, P-IDS and U-IDS of a set.

The networks' weights are named in `evaluate.features`; a score whose network has none is not computed.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.metric_networks import (
    INCEPTION_DIMENSIONS,
    LPIPS_MIN_SIZE,
    FidInception,
    Lpips,
    load_fid_inception,
    load_lpips,
)
from models.published_weights import PUBLISHED_WEIGHTS
from pipelines.downloads import download, file_sha256
from pipelines.evaluation.distances import frechet_distance, kernel_distance
from pipelines.evaluation.metrics import INCEPTION_METRICS, LPIPS_METRICS, UNFINISHED
from pipelines.recipe import FeatureWeights, WeightsFile

MIN_KID_PHOTOGRAPHS = 100
"""With fewer, KID's deviation over subsets is as large as the differences between methods."""


@dataclass(frozen=True)
class FeatureScorer:
    """LPIPS and Inception features with the weights of a config; plain data, so that it can be sent to a task.

    Each process loads the networks that it needs once.
    """

    weights: FeatureWeights

    @property
    def has_inception(self) -> bool:
        return self.weights.inception is not None

    def lpips(self, truth: np.ndarray) -> Callable[[np.ndarray], dict[str, float]]:
        """A function from a result to `lpips_alex` and `lpips_vgg`, as far as there are weights; both uint8 [H,W,3].

        The photograph's features are computed once. A score is left out if the photograph is too small for the network.
        """
        networks: dict[str, tuple[Lpips, list[Tensor]]] = {}
        for metric, name in LPIPS_METRICS.items():
            file = self.weights.networks.get(name)
            if file is not None and min(truth.shape[:2]) >= LPIPS_MIN_SIZE[name]:
                network = _load_lpips(name, file)
                with torch.no_grad():
                    networks[metric] = network, network.features(_to_signed(truth))

        def score(result: np.ndarray) -> dict[str, float]:
            with torch.no_grad():
                return {
                    metric: float(network.distance(features, network.features(_to_signed(result))))
                    for metric, (network, features) in networks.items()
                }

        return score

    def inception(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Inception features float32 [len(images), 2048] of pictures uint8 [H,W,3], each by itself: the same bits in
        any batch. Call it only with weights for Inception."""
        assert self.weights.inception is not None
        network = _load_inception(self.weights.inception)
        with torch.no_grad():
            rows = [network(torch.from_numpy(image).permute(2, 0, 1)[None]) for image in images]
        return torch.cat(rows).numpy()

    def check(self) -> None:
        """Load every network. ValueError, FileNotFoundError in one line: weights that are missing or of another network."""
        for name, file in self.weights.networks.items():
            try:
                path = Path(download(file.weights, file.sha256))
                if not path.is_file():
                    raise FileNotFoundError(
                        f"no weights file {path}: the published one is {PUBLISHED_WEIGHTS[name].url}"
                    )
                _load_inception(file) if name == "inception" else _load_lpips(name, file)
            except (ValueError, FileNotFoundError) as error:
                raise type(error)(f"features.{name}: {error}") from None

    def to_dict(self) -> dict[str, str]:
        """The entry `features` of a protocol: network -> SHA-256 of its weights."""
        return {
            name: file_sha256(Path(download(file.weights, file.sha256)))
            for name, file in sorted(self.weights.networks.items())
        }


def make_scorer(weights: FeatureWeights | None) -> FeatureScorer | None:
    """The scorer of a config; None: there is nothing to score with."""
    return FeatureScorer(weights) if weights is not None and weights.networks else None


def inception_scores(real: np.ndarray, fake: np.ndarray | None) -> dict[str, Any]:
    """{"n", "fid", "kid_inception", "kid_inception_std", "p_ids_percent", "u_ids_percent", "reasons"} of Inception
    features [n,d] of the photographs and, in the same order, of the filled pictures.

    "reasons": metric -> why it has no number. fake None: the method did not complete every photograph.
    """
    n, dimensions = real.shape
    entry: dict[str, Any] = {"n": n, "reasons": {}}
    if fake is None:
        return {**entry, "reasons": dict.fromkeys(INCEPTION_METRICS, UNFINISHED)}

    def add(
        names: tuple[str, ...], function: Callable[[], tuple[float, ...]], scored: tuple[str, ...]
    ) -> None:
        try:
            entry.update(zip(names, function(), strict=True))
        except ValueError as error:
            entry["reasons"].update(dict.fromkeys(scored, str(error)))

    add(("fid",), lambda: (frechet_distance(real, fake, min_photographs("fid", dimensions)),), ("fid",))
    add(
        ("kid_inception", "kid_inception_std"),
        lambda: kernel_distance(real, fake, least=MIN_KID_PHOTOGRAPHS),
        ("kid_inception",),
    )
    ids = ("p_ids_percent", "u_ids_percent")
    add(ids, lambda: inception_discriminative_scores(real, fake), ids)
    return entry


def min_photographs(metric: str, dimensions: int = INCEPTION_DIMENSIONS) -> int:
    """The photographs that a metric of INCEPTION_METRICS needs.

    FID: the covariance of d features from fewer than d + 1 is singular. P-IDS and U-IDS: a hyperplane separates any d + 1
    points in general position, so 2n must be more, or both scores are 0 whatever the pictures are.
    """
    if metric == "kid_inception":
        return MIN_KID_PHOTOGRAPHS
    return dimensions + 1 if metric == "fid" else (dimensions + 1) // 2 + 1


def inception_discriminative_scores(real: np.ndarray, fake: np.ndarray) -> tuple[float, float]:
    """(P-IDS, U-IDS) in percent of features [n,d] of the photographs and of the filled pictures, in the same order.

    Zhao et al. 2021 (Co-Mod-GAN), section 4; as in its released code and in MAT's: scikit-learn's LinearSVC with
    dual=False and its other defaults, fitted to and scored on all 2n features. P-IDS: the fraction of pairs in which the
    filled picture's decision value is above its photograph's. U-IDS: the fraction of the 2n that are misclassified.
    ValueError: too few photographs, different numbers of them, or features that are not finite.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.svm import LinearSVC  # importing it takes a second

    if real.shape != fake.shape:
        raise ValueError(f"features {list(real.shape)} and {list(fake.shape)} are no pairs")
    n, least = len(real), min_photographs("u_ids_percent", real.shape[1])
    if n < least:
        raise ValueError(f"{n} photograph{'s are' if n != 1 else ' is'} too few (at least {least})")
    features = np.concatenate([real, fake]).astype(np.float64)
    if not np.isfinite(features).all():
        raise ValueError("features are not finite: a picture or the network holds NaN or infinity")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # as many iterations as in the released code
        svm = LinearSVC(dual=False).fit(features, np.repeat([1, 0], n))
    values = svm.decision_function(features)
    on_real, on_fake = values[:n], values[n:]
    misclassified = int((on_real <= 0).sum()) + int((on_fake > 0).sum())
    return 100 * float(np.mean(on_fake > on_real)), 100 * misclassified / (2 * n)


@functools.lru_cache(maxsize=2)
def _load_lpips(name: str, file: WeightsFile) -> Lpips:
    return load_lpips(name, download(file.weights, file.sha256), file.sha256)


@functools.lru_cache(maxsize=1)
def _load_inception(file: WeightsFile) -> FidInception:
    return load_fid_inception(download(file.weights, file.sha256), file.sha256)


def _to_signed(image: np.ndarray) -> Tensor:
    """uint8 [H,W,3] -> [1,3,H,W] in [-1,1]."""
    return torch.from_numpy(image).permute(2, 0, 1)[None].float() / 127.5 - 1
