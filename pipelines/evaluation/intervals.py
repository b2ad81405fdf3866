"""Bootstrap confidence intervals of means over photographs, for many columns of scores at once.

All columns share their resamples, so the intervals of a whole table cost little more than one of them.
"""

from __future__ import annotations

import functools
from statistics import NormalDist

import numpy as np

CONFIDENCE_LEVEL = 0.95
MIN_PAIRS = 10  # for an interval: with fewer photographs a bootstrap interval is too short
BOOTSTRAP_RESAMPLES = 9999
_CHUNK_DRAWS = 2_000_000  # drawn at a time, to bound the memory


def bca_intervals(
    values: np.ndarray, level: float = CONFIDENCE_LEVEL, seed: int = 0, resamples: int = BOOTSTRAP_RESAMPLES
) -> np.ndarray:
    """BCa bootstrap intervals (bias-corrected and accelerated, Efron 1987) of the means of the rows of `values` [k,n].

    Float [k,2]: the lower and upper ends; NaN below MIN_PAIRS values. A pure function of its arguments. The values are
    finite. Columns i of all rows belong to one photograph and are resampled together.
    """
    values = np.ascontiguousarray(values, np.float64)
    rows, n = values.shape
    if n < MIN_PAIRS or not rows:
        return np.full((rows, 2), np.nan)
    from scipy.special import ndtr, ndtri  # importing it takes a tenth of a second

    means = values.mean(1)
    counts = _resample_counts(n, resamples, seed)
    boot = np.empty((rows, resamples))
    step = max(1, _CHUNK_DRAWS // n)
    for start in range(0, resamples, step):
        boot[:, start : start + step] = values @ counts[start : start + step].T.astype(np.float64)
    boot /= n
    # sums in another order differ in their last bits, which must not decide on which side of the mean a tie lies
    tolerance = 1e-12 * np.abs(values).max(1, keepdims=True)
    offsets = boot - means[:, None]
    below = (offsets < -tolerance).sum(1) + 0.5 * (np.abs(offsets) <= tolerance).sum(1)
    bias = ndtri(np.clip(below / resamples, 0.5 / resamples, 1 - 0.5 / resamples))
    # the jackknife's deviations of a mean are proportional to those of the values
    deviations = values - means[:, None]
    squares = (deviations**2).sum(1)
    constant = np.ptp(values, axis=1) == 0
    acceleration = (deviations**3).sum(1) / (6 * np.where(constant, 1, squares) ** 1.5)
    boot.sort(axis=1)
    z = bias[:, None] + NormalDist().inv_cdf((1 + level) / 2) * np.array([-1.0, 1.0])
    quantiles = ndtr(bias[:, None] + z / (1 - acceleration[:, None] * z))
    ends = _interpolate(boot, quantiles)
    ends[constant] = values[constant, :1]
    return ends


def _interpolate(ordered: np.ndarray, quantiles: np.ndarray) -> np.ndarray:
    """The linearly interpolated quantiles [k,2] of ordered rows [k,B]."""
    position = np.clip(quantiles, 0, 1) * (ordered.shape[1] - 1)
    below = np.floor(position).astype(np.int64)
    above = np.minimum(below + 1, ordered.shape[1] - 1)
    low, high = (np.take_along_axis(ordered, index, 1) for index in (below, above))
    return low + (high - low) * (position - below)


@functools.lru_cache(maxsize=4)
def _resample_counts(n: int, resamples: int, seed: int) -> np.ndarray:
    """uint16 [resamples,n]: how often each of n photographs is in each resample."""
    rng = np.random.default_rng(seed)
    counts = np.empty((resamples, n), np.uint16)
    step = max(1, _CHUNK_DRAWS // n)
    for start in range(0, resamples, step):
        chunk = counts[start : start + step]
        drawn = rng.integers(0, n, chunk.shape) + n * np.arange(len(chunk))[:, None]
        chunk[:] = np.bincount(drawn.ravel(), minlength=chunk.size).reshape(chunk.shape)
    counts.setflags(write=False)
    return counts
