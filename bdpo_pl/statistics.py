"""Bootstrap confidence intervals of means, rates and paired differences.

Prompts that ask for the same thing in several framings are no independent draws: what is resampled are clusters, all of
whose prompts go together (percentile bootstrap over clusters, Efron and Tibshirani 1993). Where every outcome is the
same a bootstrap has nothing to resample and would claim certainty; for rates, Wilson's interval over clusters stands
in there.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

_Z = 1.959964
_RESAMPLES = 4000
# Resamples drawn at a time: bounds the memory of suites of many thousand prompts.
_AT_ONCE = 500


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval.

    Attributes:
        value: the mean over prompts.
        low: lower end.
        high: upper end.
        count: prompts.
        clusters: what was resampled.
    """

    value: float
    low: float
    high: float
    count: int
    clusters: int


def mean(
    values: Sequence[float] | np.ndarray,
    clusters: Sequence[Hashable] | None = None,
    *,
    rate: bool = True,
    seed: int = 0,
) -> Interval:
    """The mean of `values`.

    Args:
        values: one of each prompt.
        clusters: which prompts go together; default: each is alone.
        rate: values are between 0 and 1. Of other numbers that are all the same, nothing but their value is known.
        seed: of the resampling.

    Raises:
        ValueError: there are no values, or another number of clusters.
    """
    sums, counts = _by_cluster(values, clusters)
    value = float(sums.sum() / counts.sum())
    if not _all_alike(sums, counts):
        low, high = np.percentile(_resampled(sums, counts, seed), [2.5, 97.5])
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
    """The mean of `second` − `first`, paired by prompt; outcomes are between 0 and 1.

    Raises:
        ValueError: they differ in number, or there are none.
    """
    if len(first) != len(second):
        raise ValueError(f"paired differences need pairs, got {len(first)} and {len(second)} values")
    values = np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)
    found = mean(values, clusters, rate=False, seed=seed)
    if found.low < found.high:
        return found
    # All the same: what share could yet be otherwise, in either direction?
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
    """Two-sided p-value of no difference, paired by prompt: whole clusters change sides at random (Fisher 1935).

    Raises:
        ValueError: they differ in number, or there are none.
    """
    if len(first) != len(second):
        raise ValueError(f"paired differences need pairs, got {len(first)} and {len(second)} values")
    sums, _ = _by_cluster(np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64), clusters)
    moved = sums[sums != 0]
    if not len(moved):
        return 1.0
    rng = np.random.default_rng(seed)
    signs = rng.integers(0, 2, size=(_RESAMPLES, len(moved))) * 2 - 1
    # Rounding must not tell apart what is equal; the observed signs are one of the draws.
    reached = np.abs(signs @ moved) >= abs(moved.sum()) - 1e-9
    return float((reached.sum() + 1) / (_RESAMPLES + 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for their number, in the same order (Holm 1979)."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def normal(value: float, error: float, count: int) -> Interval:
    """`value` ± 1.96 of its standard error, over `count` independent examples."""
    return Interval(value, value - _Z * error, value + _Z * error, count, count)


def wilson(successes: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a rate (Wilson 1927)."""
    rate, z2 = successes / count, _Z**2
    centre = (rate + z2 / (2 * count)) / (1 + z2 / count)
    half = _Z / (1 + z2 / count) * np.sqrt(rate * (1 - rate) / count + z2 / (4 * count**2))
    # Rounding would leave 0/n and n/n out of their own intervals.
    return max(0.0, min(rate, float(centre - half))), min(1.0, max(rate, float(centre + half)))


def _by_cluster(
    values: Sequence[float] | np.ndarray, clusters: Sequence[Hashable] | None
) -> tuple[np.ndarray, np.ndarray]:
    """(sum of values, number of values) of each cluster, in order of appearance."""
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
    """Whether every cluster has the same mean, so that resampling shows nothing."""
    return len(sums) == 1 or bool(np.allclose(sums * counts.sum(), counts * sums.sum(), rtol=1e-9, atol=0.0))


def _resampled(sums: np.ndarray, counts: np.ndarray, seed: int) -> np.ndarray:
    """Means of `_RESAMPLES` draws of as many clusters as there are, with replacement."""
    rng = np.random.default_rng(seed)
    share = np.full(len(sums), 1.0 / len(sums))
    means = []
    for _ in range(_RESAMPLES // _AT_ONCE):
        times = rng.multinomial(len(sums), share, size=_AT_ONCE)
        means.append((times @ sums) / (times @ counts))
    return np.concatenate(means)
