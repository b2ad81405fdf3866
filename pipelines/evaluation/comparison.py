"""Paired differences between two methods on the same photographs and masks, with bootstrap confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_prep.masks import HOLE_AREA_BANDS
from pipelines.evaluation.intervals import BOOTSTRAP_RESAMPLES, CONFIDENCE_LEVEL, MIN_PAIRS, bca_intervals
from pipelines.evaluation.metrics import ALL_COLUMNS, higher_is_better
from pipelines.evaluation.results import EvaluationResult

INTERVAL_NOTE = (
    f"{CONFIDENCE_LEVEL * 100:.0f} % intervals of the mean paired difference: BCa bootstrap over photographs, "
    f"{BOOTSTRAP_RESAMPLES} draws"
)

ScoreColumn = Sequence[float | None]
"""A method's score per photograph; None if the metric does not exist there."""

# field -> its key in stored records
_STORED = {"excluded": "left_out", "mean_a": "a", "mean_b": "b", "mean_difference": "difference"}


@dataclass(frozen=True)
class PairedDifference:
    """Metric of B minus metric of A, over the photographs of one hole-area band ("all": all bands) of one mask set."""

    masks: str
    band: str
    metric: str
    n: int
    """Photographs for which both methods have a finite score."""
    excluded: int
    """Photographs with an infinite score: exact results, whose PSNR is infinite."""
    mean_a: float
    mean_b: float
    mean_difference: float
    low: float | None
    """Ends of the interval; None: too few photographs."""
    high: float | None

    def as_json(self) -> dict[str, Any]:
        """The record in the history of aliases, and the output of --json."""
        return {_STORED.get(key, key): value for key, value in vars(self).items()}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> PairedDifference:
        """Decode the output of `as_json`; unknown keys are ignored. KeyError: a field is missing."""
        return cls(**{name: record[_STORED.get(name, name)] for name in cls.__dataclass_fields__})

    @property
    def improvement(self) -> float:
        """How much better B is, in the unit of the metric; negative if B is worse."""
        return self.mean_difference if higher_is_better(self.metric) else -self.mean_difference

    @property
    def verdict(self) -> str:
        """B compared with A, in words: "better" and "worse" only if the interval does not contain 0."""
        if self.low is None or self.high is None:
            return f"too few (under {MIN_PAIRS})"
        if self.low == self.high == 0:
            return "the same"
        if self.low <= 0 <= self.high:
            return "no difference shown"
        return "better" if self.improvement > 0 else "worse"

    @property
    def interval_text(self) -> str:
        """`+0.11 to +0.36`; '' without an interval."""
        if self.low is None or self.high is None:
            return ""
        digits = _digits(self.metric)
        return f"{self.low:+.{digits}f} to {self.high:+.{digits}f}"

    def __str__(self) -> str:
        """`psnr_rgb_hole 18.22 against 17.98 (+0.24; 95 % interval +0.11 to +0.36, n = 84)`, B before A."""
        digits = _digits(self.metric)
        interval = (
            f"95 % interval {self.interval_text}, " if self.interval_text else "too few for an interval, "
        )
        return (
            f"{self.metric} {self.mean_b:.{digits}f} against {self.mean_a:.{digits}f} "
            f"({self.mean_difference:+.{digits}f}; {interval}n = {self.n})"
        )


def compare_methods(evaluation: EvaluationResult, a: str, b: str) -> list[PairedDifference]:
    """Differences in every metric, for each mask set: over all photographs, and per hole-area band.

    Raises ValueError if a method failed on a photograph.
    """
    differences = []
    for masks, bands in evaluation.bands.items():
        scores_a, scores_b = (complete_scores(evaluation, method, masks) for method in (a, b))
        present = [band for band in HOLE_AREA_BANDS if band in bands]
        for band in ["all", *present] if len(present) > 1 else ["all"]:
            indices = [i for i, photo_band in enumerate(bands) if band in ("all", photo_band)]
            for metric in scores_a:
                if metric in scores_b:
                    x, y = ([column[metric][i] for i in indices] for column in (scores_a, scores_b))
                    difference = paired_difference(x, y, metric, masks, band)
                    differences += [difference] if difference else []
    return differences


def complete_scores(evaluation: EvaluationResult, method: str, masks: str) -> Mapping[str, ScoreColumn]:
    """metric -> score per photograph. Raises ValueError if the method failed on a photograph."""
    failed = evaluation.failures.get(masks, {}).get(method, {})
    if failed:
        reason = next(iter(failed.values()))
        raise ValueError(
            f"{method} cannot complete {len(failed)} of {len(evaluation.photos)} photographs: {reason}"
        )
    return evaluation.values[masks][method]


def paired_difference(
    a: ScoreColumn, b: ScoreColumn, metric: str, masks: str, band: str = "all"
) -> PairedDifference | None:
    """The difference between two methods' scores of the same photographs; None if no photograph has both."""
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    finite = np.array([pair for pair in pairs if all(map(math.isfinite, pair))])
    if not len(finite):
        return None
    differences = finite[:, 1] - finite[:, 0]
    low, high = bca_interval(differences) or (None, None)
    mean_a, mean_b = finite.mean(0).tolist()
    return PairedDifference(
        masks=masks,
        band=band,
        metric=metric,
        n=len(finite),
        excluded=len(pairs) - len(finite),
        mean_a=mean_a,
        mean_b=mean_b,
        mean_difference=float(differences.mean()),
        low=low,
        high=high,
    )


def bca_interval(
    values: np.ndarray, level: float = CONFIDENCE_LEVEL, seed: int = 0
) -> tuple[float, float] | None:
    """`bca_intervals` of one mean; None below MIN_PAIRS values."""
    if len(values) < MIN_PAIRS:
        return None
    low, high = bca_intervals(values[None], level, seed)[0]
    return float(low), float(high)


def _digits(metric: str) -> int:
    """Decimals of the metric in the tables."""
    return next((digits for _, name, digits in ALL_COLUMNS if name == metric), 3)
