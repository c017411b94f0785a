"""Confidence intervals of means, rates and paired differences, rank correlation, and p-values of changes.

Prompts that make the same request in several framings are not independent. Whole clusters of such prompts are therefore
resampled (percentile bootstrap over clusters, Efron and Tibshirani 1993). If all outcomes are the same, a bootstrap
would give an interval of length 0 and claim certainty; for rates, Wilson's interval over clusters replaces it.

scipy is imported where it is used, because that takes a second, which `--help` need not wait for.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

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
        rate: true if values are between 0 and 1. Otherwise the interval of values that are all the same has length 0.
        seed: seed of the resampling.

    Raises:
        ValueError: there are no values, or their number differs from that of `clusters`.
    """
    sums, counts = _by_cluster(values, clusters)
    value = float(sums.sum() / counts.sum())
    if not _all_alike(sums, counts):
        low, high = _bootstrap(sums, counts, seed)
    elif rate:
        low, high = wilson(value * len(sums), len(sums))
    else:
        low = high = value
    return Interval(value, float(low), float(high), int(counts.sum()), len(sums))


def difference(
    first: Sequence[float] | np.ndarray,
    second: Sequence[float] | np.ndarray,
    clusters: Sequence[Hashable] | None = None,
    *,
    seed: int = 0,
) -> Interval:
    """Compute the mean of `second` − `first`, paired by prompt; outcomes are between 0 and 1.

    Raises:
        ValueError: the numbers of values differ, or there are no values.
    """
    if len(first) != len(second):
        raise ValueError(f"paired differences need pairs, got {len(first)} and {len(second)} values")
    values = np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)
    found = mean(values, clusters, rate=False, seed=seed)
    if found.low < found.high:
        return found
    # All differences are the same: add the share that could still differ, in either direction.
    other = 1.0 - wilson(found.clusters, found.clusters)[0]
    low, high = max(-1.0, found.value - other), min(1.0, found.value + other)
    return Interval(found.value, low, high, found.count, found.clusters)


def paired_p(
    first: Sequence[float] | np.ndarray,
    second: Sequence[float] | np.ndarray,
    clusters: Sequence[Hashable] | None = None,
    *,
    seed: int = 0,
) -> float:
    """Compute the two-sided p-value of no difference, paired by prompt: random signs of clusters (Fisher 1935).

    Raises:
        ValueError: the numbers of values differ, or there are no values.
    """
    if len(first) != len(second):
        raise ValueError(f"paired differences need pairs, got {len(first)} and {len(second)} values")
    sums, _ = _by_cluster(np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64), clusters)
    moved = sums[sums != 0]
    if not len(moved):
        return 1.0
    rng = np.random.default_rng(seed)
    signs = rng.integers(0, 2, size=(_RESAMPLES, len(moved))) * 2 - 1
    # The tolerance keeps rounding from separating equal sums; the +1 counts the observed signs as one of the draws.
    reached = np.abs(signs @ moved) >= abs(moved.sum()) - 1e-9
    return float((reached.sum() + 1) / (_RESAMPLES + 1))


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


def wilson(successes: float, count: int) -> tuple[float, float]:
    """Compute Wilson's 95 % score interval of a rate (Wilson 1927).

    scipy's version takes only whole counts, but the mean rate of clusters times their number need not be whole.
    """
    rate, z2 = successes / count, _Z**2
    centre = (rate + z2 / (2 * count)) / (1 + z2 / count)
    half = _Z / (1 + z2 / count) * np.sqrt(rate * (1 - rate) / count + z2 / (4 * count**2))
    # Without this, rounding would exclude 0/n and n/n from their own intervals.
    return max(0.0, min(rate, float(centre - half))), min(1.0, max(rate, float(centre + half)))


def finite(value: Any) -> Any:
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
