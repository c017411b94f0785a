"""Confidence intervals of means, rates and paired differences, rank correlation, and p-values of changes.

Prompts that make the same request in several framings are not independent, so they count as a cluster. Rates have
Wilson's interval, for as many prompts as would be as uncertain if all prompts of a cluster had the same outcome (Kish
1965). That number does not depend on the outcomes: one more failure therefore never lowers an end, which limits on
ends rely on. For numbers and differences, whole clusters are resampled (percentile bootstrap, Efron and Tibshirani
1993), which would claim certainty if all outcomes were the same; `difference` corrects that.

scipy is imported where it is used, because that takes a second, which `--help` need not wait for.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

SIGNIFICANT = 0.05
"""p-value below which a change is significant."""
_Z = 1.959964
_RESAMPLES = 4000
# Number of values drawn at a time: bounds the memory for suites of many thousand prompts.
_AT_ONCE = 2_000_000
_LEAST_FOR_CORRELATION = 3


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval.

    Attributes:
        value: mean of the values.
        low: lower end of the interval; NaN if there is none.
        high: upper end of the interval; NaN if there is none.
        count: number of values, for example prompts or pairs.
        clusters: number of values that are independent of one another.
    """

    value: float
    low: float
    high: float
    count: int
    clusters: int

    @property
    def bounded(self) -> bool:
        """True if there is an interval."""
        return not math.isnan(self.low)


def mean(
    values: Sequence[float] | np.ndarray,
    clusters: Sequence[Hashable] | None = None,
    *,
    rate: bool = True,
    seed: int = 0,
) -> Interval:
    """Compute the mean of `values` with its interval.

    Args:
        values: one value for each prompt.
        clusters: cluster of each prompt. Default: each prompt is a cluster of its own.
        rate: true if values are outcomes, 0 or 1, whose interval is Wilson's. For grades between 0 and 1 that is wider
            than necessary. Otherwise the interval is by resampling; if all values are the same, it has length 0.
        seed: seed of the resampling.

    Raises:
        ValueError: there are no values, or their number differs from that of `clusters`.
    """
    sums, counts = _by_cluster(values, clusters)
    value = float(sums.sum() / counts.sum())
    if rate:
        # Kish's number for a correlation of 1 within clusters. An estimate of it from the outcomes would have a wider
        # interval for no failure in ten clusters of three than for one.
        effective = float(counts.sum() ** 2 / (counts**2).sum())
        low, high = wilson(value * effective, effective)
    elif _all_alike(sums, counts):
        low = high = value
    else:
        low, high = _bootstrap(sums, counts, seed)
    return Interval(value, float(low), float(high), int(counts.sum()), len(sums))


def difference(
    first: Sequence[float] | np.ndarray,
    second: Sequence[float] | np.ndarray,
    clusters: Sequence[Hashable] | None = None,
    *,
    seed: int = 0,
) -> Interval:
    """Compute the mean of `second` − `first`, outcomes of 0 or 1 that are paired by prompt.

    The bootstrap is too narrow if few prompts changed: four of 80, all in one direction, would exclude 0 although
    their `paired_p` is 0.125. The interval is therefore extended to 0 if that p-value is not significant. If it is,
    the ends are those of the bootstrap, so that in rare cases they include 0, too.

    Raises:
        ValueError: the numbers of values differ, there are no values, or one is neither 0 nor 1.
    """
    p = paired_p(first, second, clusters)
    found = mean(_changes(first, second), clusters, rate=False, seed=seed)
    low, high = found.low, found.high
    if low == high:
        # All differences are the same: add the share that could still differ, in either direction.
        other = 1.0 - wilson(found.clusters, found.clusters)[0]
        low, high = max(-1.0, found.value - other), min(1.0, found.value + other)
    if p >= SIGNIFICANT:
        low, high = min(0.0, low), max(0.0, high)
    return Interval(found.value, low, high, found.count, found.clusters)


def paired_p(
    first: Sequence[float] | np.ndarray,
    second: Sequence[float] | np.ndarray,
    clusters: Sequence[Hashable] | None = None,
) -> float:
    """Compute the two-sided p-value of no difference between outcomes of 0 or 1 that are paired by prompt.

    It is the share of exchanges of both sides of whole clusters that make the difference as large (Fisher 1935), and
    exact: the sums of clusters are whole numbers, so the chances of all sums are added up. If each prompt is a cluster
    of its own, this is the sign test (McNemar's exact test).

    Raises:
        ValueError: the numbers of values differ, there are no values, or one is neither 0 nor 1.
    """
    sums, _ = _by_cluster(_changes(first, second), clusters)
    sizes = np.abs(sums).astype(np.int64)
    chances = np.ones(1)  # of the sums −n to n, where n is the sum of the sizes so far
    for size in sizes[sizes > 0]:
        chances = (np.pad(chances, (0, 2 * size)) + np.pad(chances, (2 * size, 0))) / 2
    reached = np.abs(np.arange(len(chances)) - sizes.sum()) >= abs(round(sums.sum()))
    return min(1.0, float(chances[reached].sum()))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for their number, in the same order (Holm 1979)."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def independent(values: np.ndarray, least: int) -> Interval:
    """Compute the mean of (M,) independent values ± 1.96 standard errors; no interval for fewer than `least` values."""
    count, value = len(values), float(values.mean())
    if count < least:
        return Interval(value, math.nan, math.nan, count, count)
    return normal(value, float(values.std(ddof=1)) / count**0.5, count)


def spearman(first: np.ndarray, second: np.ndarray) -> float | None:
    """Compute Spearman's rank correlation of two (M,) arrays; None for fewer than 3 pairs or a constant side."""
    from scipy.stats import spearmanr  # type: ignore[import-untyped]

    if len(first) < _LEAST_FOR_CORRELATION or np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return float(spearmanr(first, second).statistic)


def normal(value: float, error: float, count: int) -> Interval:
    """Return `value` ± 1.96 of its standard error, over `count` independent examples."""
    return Interval(value, value - _Z * error, value + _Z * error, count, count)


def wilson(successes: float, count: float) -> tuple[float, float]:
    """Compute Wilson's 95 % score interval of a rate (Wilson 1927).

    scipy's version takes only whole counts, but the effective number of clustered prompts need not be whole.
    """
    rate, z2 = successes / count, _Z**2
    centre = (rate + z2 / (2 * count)) / (1 + z2 / count)
    half = _Z / (1 + z2 / count) * np.sqrt(rate * (1 - rate) / count + z2 / (4 * count**2))
    # Without this, rounding would exclude 0/n and n/n from their own intervals.
    return max(0.0, min(rate, float(centre - half))), min(1.0, max(rate, float(centre + half)))


def gap(first: Interval, second: Interval) -> Interval:
    """Compute `first` − `second`, two independent results, from their intervals (Newcombe 1998, method 10).

    It is his for rates with Wilson's intervals. For normal intervals it is the normal one of the difference.
    """
    value = first.value - second.value
    below = math.hypot(first.value - first.low, second.high - second.value)
    above = math.hypot(first.high - first.value, second.value - second.low)
    return Interval(value, value - below, value + above, first.count + second.count, first.clusters + second.clusters)


def finite(value: object) -> Any:
    """Return JSON values with null for numbers that JSON does not have, such as the ends of a missing interval."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _by_cluster(
    values: Sequence[float] | np.ndarray, clusters: Sequence[Hashable] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return (sum of values, number of values) of each cluster, in order of appearance."""
    numbers = np.asarray(values, dtype=np.float64)
    if not len(numbers):
        raise ValueError("the mean of no values is undefined")
    if clusters is None:
        return numbers, np.ones(len(numbers))
    if len(clusters) != len(numbers):
        raise ValueError(f"{len(numbers)} values, but {len(clusters)} clusters")
    order: dict[Hashable, int] = {}
    index = np.array([order.setdefault(cluster, len(order)) for cluster in clusters])
    return np.bincount(index, weights=numbers), np.bincount(index).astype(np.float64)


def _changes(first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return `second` − `first`, after checking that both are outcomes of the same prompts."""
    if len(first) != len(second):
        raise ValueError(f"paired differences need pairs, got {len(first)} and {len(second)} values")
    before, after = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if not np.isin([before, after], (0.0, 1.0)).all():
        raise ValueError("paired outcomes must be 0 or 1")
    return after - before


def _all_alike(sums: np.ndarray, counts: np.ndarray) -> bool:
    """Return true if every cluster has the same mean, so that resampling would show no variation."""
    return len(sums) == 1 or bool(np.allclose(sums * counts.sum(), counts * sums.sum(), rtol=1e-9, atol=0.0))


def _bootstrap(sums: np.ndarray, counts: np.ndarray, seed: int) -> tuple[float, float]:
    """Return the ends of the interval of the mean: percentiles over resamples of all clusters, with replacement."""
    from scipy.stats import bootstrap

    def mean_of(sums: np.ndarray, counts: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.asarray(sums.sum(axis=axis) / counts.sum(axis=axis))

    found = bootstrap(
        (sums, counts), mean_of, paired=True, vectorized=True, n_resamples=_RESAMPLES, method="percentile",
        batch=max(1, _AT_ONCE // len(sums)), rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return float(found.low), float(found.high)
