"""Means with 95% intervals, differences paired by seed, and interpolated curves, from and to plain numbers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import numpy as np
from scipy.special import stdtrit

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over seeds and its interval."""

    mean: float
    low: float | None  # None: one seed has no interval
    high: float | None
    n: int  # seeds

    @property
    def sign(self) -> int:
        """-1 or 1 where the interval excludes 0, on that side; else 0."""
        if self.low is None or self.high is None:
            return 0
        return -1 if self.high < 0 else 1 if self.low > 0 else 0


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean and the interval mean -/+ t s / sqrt(n): Student's t with n - 1 degrees of freedom, s the sample
    standard deviation."""
    mean, n = fmean(values), len(values)
    if n < 2:
        return Estimate(mean, None, None, n)
    half = t_quantile(n - 1) * stdev(values) / math.sqrt(n)
    return Estimate(mean, mean - half, mean + half, n)


def paired(a: Mapping[int, float], b: Mapping[int, float]) -> Estimate | None:
    """Estimate a - b over the seeds that both have; None if there are none."""
    seeds = sorted(a.keys() & b.keys())
    return estimate([a[seed] - b[seed] for seed in seeds]) if seeds else None


def t_quantile(degrees: int, confidence: float = CONFIDENCE) -> float:
    """Return the t that Student's distribution exceeds in absolute value with probability 1 - confidence."""
    return float(stdtrit(degrees, (1 + confidence) / 2))


def read_between(x: Sequence[float], y: Sequence[float], at: float) -> float | None:
    """Interpolate a curve linearly at a place; None outside of its points.

    Args:
        x: ascending.
    """
    slack = 1e-9 * abs(at)
    if not x or not x[0] - slack <= at <= x[-1] + slack:
        return None
    return float(np.interp(at, x, y))
