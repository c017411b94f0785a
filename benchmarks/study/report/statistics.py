"""Means over seeds, differences paired by seed, and Holm's correction, all with Student's t."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy import stats

LEVEL = 0.95
ROUNDING = 1e-6
"""Relative size of differences that are rounding errors: measures are often means in float32."""


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with its 95 % interval.

    Attributes:
        mean: mean of the values; NaN if there are none.
        half: half the interval's width; NaN for fewer than two values, or if all are equal.
        count: number of seeds.
        p: two-sided p of the mean against the requested bound.
    """

    mean: float
    half: float
    count: int
    p: float

    @property
    def low(self) -> float:
        """Lower end."""
        return self.mean - self.half

    @property
    def high(self) -> float:
        """Upper end."""
        return self.mean + self.half


def quantile(freedom: int, level: float = LEVEL) -> float:
    """Return t with P(|T| ≤ t) = `level`, at `freedom` degrees of freedom."""
    return float(stats.t.ppf((1 + level) / 2, freedom))


def interval(values: Sequence[float], bound: float = 0.0, scale: float = 0.0) -> Interval:
    """Return the mean of `values` with its t interval.

    If all values are equal, t has no error estimate: there is no interval, and p is the sign test's.

    Args:
        values: finite values, one per seed.
        bound: value with which p compares the mean.
        scale: size of the numbers that the values are differences of, if they are: each has their rounding error.
    """
    count = len(values)
    if count < 2:
        return Interval(values[0] if count else math.nan, math.nan, count, math.nan)
    mean = math.fsum(values) / count
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    rounding = ROUNDING * max(scale, *map(abs, values))
    if math.sqrt(variance) <= rounding:
        return Interval(mean, math.nan, count, 1.0 if abs(mean - bound) <= rounding else 0.5 ** (count - 1))
    error = math.sqrt(variance / count)
    p = float(2 * stats.t.sf(abs(mean - bound) / error, count - 1))
    return Interval(mean, quantile(count - 1) * error, count, p)


def paired(first: Mapping[int, float], second: Mapping[int, float], bound: float = 0.0) -> Interval:
    """Return the mean of first − second over the seeds that both have.

    Args:
        first: values by seed.
        second: values to subtract, by seed.
        bound: value with which p compares the mean.
    """
    seeds = sorted(first.keys() & second.keys())
    scale = max((abs(values[seed]) for values in (first, second) for seed in seeds), default=0.0)
    return interval([first[seed] - second[seed] for seed in seeds], bound, scale)


def holm(ps: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p of a family (Holm 1979), in its order; NaN stays, and is not part of the family."""
    order = sorted((p, place) for place, p in enumerate(ps) if not math.isnan(p))
    adjusted = [math.nan] * len(ps)
    largest = 0.0
    for rank, (p, place) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p))
        adjusted[place] = largest
    return adjusted
