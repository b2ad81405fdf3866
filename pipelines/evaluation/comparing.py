"""Two methods on the same photographs and masks: paired differences, with intervals that say what they are worth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipelines.evaluation.metrics import BANDS, higher_is_better
from pipelines.evaluation.scores import Evaluation
from pipelines.evaluation.tables import COLUMNS

LEVEL = 0.95
ENOUGH = 10  # pairs below which no interval is given: a bootstrap of fewer is too short
RESAMPLES = 9999
METHOD = f"{LEVEL * 100:.0f} % intervals of the mean paired difference: BCa bootstrap over photographs, {RESAMPLES} draws"

Column = Sequence[float | None]
"""A method's score of every photograph; None: it has none there."""


@dataclass(frozen=True)
class Difference:
    """A metric of B minus that of A over the photographs of one band ("all": every one) of one kind of masks."""

    masks: str
    band: str
    metric: str
    n: int
    """Photographs that both have a finite score of; `left_out` have not: exact results, whose PSNR is infinite."""
    left_out: int
    a: float
    b: float
    difference: float
    low: float | None
    """The interval; None: too few photographs for one."""
    high: float | None

    @property
    def gain(self) -> float:
        """How much better B is, in the metric's unit; negative: worse."""
        return self.difference if higher_is_better(self.metric) else -self.difference

    @property
    def verdict(self) -> str:
        if self.low is None or self.high is None:
            return f"too few (under {ENOUGH})"
        if self.low == self.high == 0:
            return "the same"
        if self.low <= 0 <= self.high:
            return "no difference shown"
        return "better" if self.gain > 0 else "worse"

    @property
    def interval(self) -> str:
        if self.low is None or self.high is None:
            return ""
        digits = _digits(self.metric)
        return f"{self.low:+.{digits}f} to {self.high:+.{digits}f}"

    def __str__(self) -> str:
        """`psnr_rgb_hole 18.22 against 17.98 (+0.24; 95 % interval +0.11 to +0.36, n = 84)`, B before A."""
        digits = _digits(self.metric)
        interval = f"95 % interval {self.interval}, " if self.interval else "too few for an interval, "
        return (
            f"{self.metric} {self.b:.{digits}f} against {self.a:.{digits}f} "
            f"({self.difference:+.{digits}f}; {interval}n = {self.n})"
        )


def differences(evaluation: Evaluation, a: str, b: str) -> list[Difference]:
    """Every metric of two of its methods, for each kind of masks over all photographs and in each band.

    ValueError: a method failed on a photograph.
    """
    found = []
    for masks, bands in evaluation.bands.items():
        first, second = (whole(evaluation, method, masks) for method in (a, b))
        present = [band for band in BANDS if band in bands]
        for band in ["all", *present] if len(present) > 1 else ["all"]:
            chosen = [i for i, of in enumerate(bands) if band in ("all", of)]
            for metric in first:
                if metric in second:
                    x, y = ([column[metric][i] for i in chosen] for column in (first, second))
                    one = paired(x, y, metric, masks, band)
                    found += [one] if one else []
    return found


def whole(evaluation: Evaluation, method: str, masks: str) -> Mapping[str, Column]:
    """metric -> a value a photograph; ValueError when the method failed on one."""
    failed = evaluation.failures.get(masks, {}).get(method, {})
    if failed:
        reason = next(iter(failed.values()))
        raise ValueError(
            f"{method} cannot complete {len(failed)} of {len(evaluation.photos)} photographs: {reason}"
        )
    return evaluation.values[masks][method]


def paired(a: Column, b: Column, metric: str, masks: str, band: str = "all") -> Difference | None:
    """The difference of two columns of scores of the same photographs; None when no photograph has both."""
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    finite = np.array([pair for pair in pairs if all(map(math.isfinite, pair))])
    if not len(finite):
        return None
    apart = finite[:, 1] - finite[:, 0]
    low, high = interval(apart) or (None, None)
    mean_a, mean_b = finite.mean(0).tolist()
    return Difference(
        masks=masks,
        band=band,
        metric=metric,
        n=len(finite),
        left_out=len(pairs) - len(finite),
        a=mean_a,
        b=mean_b,
        difference=float(apart.mean()),
        low=low,
        high=high,
    )


def interval(values: np.ndarray, level: float = LEVEL, seed: int = 0) -> tuple[float, float] | None:
    """The bias-corrected and accelerated bootstrap interval (Efron 1987) of a mean; None: fewer than ENOUGH values."""
    if len(values) < ENOUGH:
        return None
    if np.ptp(values) == 0:  # nothing to resample
        return float(values[0]), float(values[0])
    from scipy.stats import bootstrap  # a second to import

    found = bootstrap(
        (values,),
        np.mean,
        confidence_level=level,
        n_resamples=RESAMPLES,
        method="BCa",
        batch=max(1, 2_000_000 // len(values)),
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)


def _digits(metric: str) -> int:
    """Decimals of a metric in the tables."""
    return next((digits for _, known, digits in COLUMNS if known == metric), 3)
