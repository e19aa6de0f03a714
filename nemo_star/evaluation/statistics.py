"""Means and differences of scores, with what chance may have done to them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

RESAMPLES = 10_000
"""Of a bootstrap."""
_CHUNK = 1_000
CONFIDENCE = 0.95
_NORMAL_QUANTILE = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)


@dataclass(frozen=True)
class Interval:
    """A mean, and the interval that holds it with 95% confidence."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.1f} [{self.low:.1f}, {self.high:.1f}]"


def bootstrap(values: Sequence[float], *, seed: int = 0) -> Interval:
    """Of the mean, by the percentiles of resampled means (Efron's percentile bootstrap).

    Differences are given sample by sample: what is hard for both methods then cancels out.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("no values to take the mean of")
    data = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    means = [
        data[rng.integers(0, len(data), size=(_CHUNK, len(data)))].mean(axis=1) for _ in range(RESAMPLES // _CHUNK)
    ]
    rest = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.concatenate(means), (rest, 1 - rest))
    return Interval(float(data.mean()), float(low), float(high))


def wilson(count: int, of: int) -> Interval:
    """A share, 0 to 100, from how often something was seen; by Wilson's score interval (1927), which does not shrink to
    nothing where it was always or never seen.

    Raises:
        ValueError: nothing was looked at.
    """
    if of < 1:
        raise ValueError("no values to take the share of")
    z = _NORMAL_QUANTILE
    middle = (count + z**2 / 2) / (of + z**2)
    half = z / (of + z**2) * math.sqrt(count * (of - count) / of + z**2 / 4)
    return Interval(100 * count / of, 100 * max(0.0, middle - half), 100 * min(1.0, middle + half))


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Rank correlation of paired values, ties having their mean rank (Spearman 1904); None where one side does not
    vary, or there are fewer than three pairs."""
    ranks = [_ranks(values) for values in (first, second)]
    if len(ranks[0]) < 3 or any(np.ptp(of_one) == 0 for of_one in ranks):
        return None
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _ranks(values: Sequence[float]) -> np.ndarray:
    """From 1; equal values share the mean of their ranks."""
    _, place, counts = np.unique(np.asarray(values, dtype=np.float64), return_inverse=True, return_counts=True)
    last = counts.cumsum()
    mean: np.ndarray = (last - (counts - 1) / 2)[place]
    return mean
