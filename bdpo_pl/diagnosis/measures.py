"""Comprehension, imbalance, balance weights and lengths of a split, summed up in numbers.

Shapes: M pairs; row 0 of a (2, M) array is the chosen response's, row 1 the rejected's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from bdpo_pl.data.table import PairTable

_LENGTH_GROUPS = 6
_LEAST_FOR_INTERVAL = 10
_LEAST_FOR_CORRELATION = 3
_SMALLEST_WEIGHT = 1e-12
_ROUND_TAUS = (0.1, 0.25, 0.5, 1.0, 2.0)
# A ratio beyond e^600 is infinite for all purposes, and JSON has no infinity.
_LARGEST_EXPONENT = 600.0


@dataclass(frozen=True)
class Measured:
    """What was measured of the M pairs of a split.

    Attributes:
        table: the pairs.
        comprehension: (2, M) float64.
        weights: (2, M) float64 balance weights.
        scale: (M,) float64 scaling factor.
        strong_ratio: a pair is re-weighted strongly if its larger weight is at least so many times the smaller.
    """

    table: PairTable
    comprehension: np.ndarray
    weights: np.ndarray
    scale: np.ndarray
    strong_ratio: float

    @cached_property
    def imbalance(self) -> np.ndarray:
        """(M,) comprehension of the chosen − of the rejected."""
        return self.comprehension[0] - self.comprehension[1]

    @cached_property
    def ratio(self) -> np.ndarray:
        """(M,) the larger weight over the smaller."""
        return self.weights.max(axis=0) / self.weights.min(axis=0).clip(_SMALLEST_WEIGHT)

    @cached_property
    def strong(self) -> np.ndarray:
        """(M,) bool: re-weighted strongly."""
        return self.ratio >= self.strong_ratio

    @cached_property
    def lengths(self) -> np.ndarray:
        """(2, M) int64 tokens in each response."""
        return self.table.trained_lengths.astype(np.int64)


@dataclass(frozen=True)
class Mean:
    """A mean with its 95 % interval, ± 1.96 standard errors; no interval for fewer than 10 values."""

    mean: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, values: np.ndarray) -> Mean:
        """The mean of (M,) `values`."""
        mean = float(values.mean())
        if len(values) < _LEAST_FOR_INTERVAL:
            return cls(mean)
        error = 1.96 * float(values.std(ddof=1)) / len(values) ** 0.5
        return cls(mean, mean - error, mean + error)


@dataclass(frozen=True)
class Temperature:
    """What a τ would make of the pairs: the larger weight over the smaller, exp(|imbalance| / τ).

    Attributes:
        tau: of the softmax weighting.
        median: ratio that half the pairs stay within.
        p95: ratio that 95 % stay within.
        largest: of all pairs.
    """

    tau: float
    median: float
    p95: float
    largest: float


@dataclass(frozen=True)
class Group:
    """Pairs that have something in common.

    Attributes:
        name: what they share.
        pairs: how many they are.
        tokens: mean length of their responses.
        chosen: comprehension of the chosen.
        rejected: comprehension of the rejected.
        imbalance: chosen − rejected.
        size: mean of the imbalance without its sign.
        spread: standard deviation of the imbalance; None of one pair.
        strong: share that is re-weighted strongly.
        strength_chosen: mean of scaling factor × balance weight of the chosen; 1 in plain DPO.
        strength_rejected: likewise of the rejected.
    """

    name: str
    pairs: int
    tokens: float
    chosen: Mean
    rejected: Mean
    imbalance: Mean
    size: float
    spread: float | None
    strong: float
    strength_chosen: float
    strength_rejected: float


@dataclass(frozen=True)
class LengthBias:
    """Whether length gives the preference away; correlations are Spearman's, None where they are not defined.

    Attributes:
        chosen_longer: share of pairs whose chosen response has more tokens.
        rejected_longer: share whose rejected response has.
        mean_chosen: tokens.
        mean_rejected: tokens.
        correlation_chosen: of comprehension and length, of chosen responses.
        correlation_rejected: of rejected ones.
        correlation_imbalance: of the imbalance and the difference in length.
    """

    chosen_longer: float
    rejected_longer: float
    mean_chosen: float
    mean_rejected: float
    correlation_chosen: float | None
    correlation_rejected: float | None
    correlation_imbalance: float | None


def group(measured: Measured, name: str, index: np.ndarray | None = None) -> Group:
    """The pairs at `index`, or all, as one group; at least one."""
    i = np.arange(len(measured.table)) if index is None else index
    strength = measured.scale[i] * measured.weights[:, i]
    return Group(
        name,
        len(i),
        float(measured.lengths[:, i].mean()),
        Mean.of(measured.comprehension[0, i]),
        Mean.of(measured.comprehension[1, i]),
        Mean.of(measured.imbalance[i]),
        float(np.abs(measured.imbalance[i]).mean()),
        float(measured.imbalance[i].std(ddof=1)) if len(i) > 1 else None,
        float(measured.strong[i].mean()),
        float(strength[0].mean()),
        float(strength[1].mean()),
    )


def suggested_tau(measured: Measured) -> float | None:
    """The spread of the imbalance in two digits, which τ should be about; None where there is none to speak of."""
    spread = group(measured, "").spread
    return float(f"{spread:.2g}") if spread else None


def temperatures(measured: Measured, tau: float) -> list[Temperature]:
    """What the `tau` in use, the suggested one and some round ones would do, the lowest first."""
    sizes = np.abs(measured.imbalance)
    found = {tau, suggested_tau(measured) or tau, *_ROUND_TAUS}
    return [
        Temperature(
            value,
            *(
                float(np.exp(min(_LARGEST_EXPONENT, size / value)))
                for size in (np.median(sizes), np.quantile(sizes, 0.95), sizes.max())
            ),
        )
        for value in sorted(found)
    ]


def by_category(measured: Measured) -> list[Group]:
    """A group for each category, the most imbalanced first; none if no pair has a category."""
    if not any(measured.table.categories):
        return []
    labels, which, counts = np.unique(measured.table.categories, return_inverse=True, return_counts=True)
    members = np.split(np.argsort(which, kind="stable"), np.cumsum(counts)[:-1])
    groups = [group(measured, str(label) or "(none)", index) for label, index in zip(labels, members, strict=True)]
    return sorted(groups, key=lambda g: (-g.size, g.name))


def by_length(measured: Measured) -> list[Group]:
    """Groups of about equal size by the mean length of a pair's responses, the shortest first."""
    lengths = measured.lengths.mean(axis=0)
    edges = np.unique(np.quantile(lengths, np.linspace(0, 1, _LENGTH_GROUPS + 1)[1:-1]))
    which = np.searchsorted(edges, lengths, side="left")
    members = [np.flatnonzero(which == k) for k in np.unique(which)]
    return [group(measured, _span(lengths[index]), index) for index in members]


def length_bias(measured: Measured) -> LengthBias:
    """See `LengthBias`."""
    chosen, rejected = measured.lengths
    return LengthBias(
        float((chosen > rejected).mean()),
        float((rejected > chosen).mean()),
        float(chosen.mean()),
        float(rejected.mean()),
        spearman(measured.comprehension[0], chosen),
        spearman(measured.comprehension[1], rejected),
        spearman(measured.imbalance, chosen - rejected),
    )


def spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    """Spearman's rank correlation of two (M,) arrays; None for fewer than 3 pairs or a constant side."""
    if len(a) < _LEAST_FOR_CORRELATION:
        return None
    ranks = np.stack([_ranks(a), _ranks(b)])
    if (np.ptp(ranks, axis=1) == 0).any():
        return None
    return float(np.corrcoef(ranks)[0, 1])


def extremes(measured: Measured, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the `count` pairs at most with the highest imbalance, and of those with the lowest, farthest first.

    No pair is in both, and none of the wrong sign in either.
    """
    order = np.argsort(measured.imbalance, kind="stable")
    low = order[:count][measured.imbalance[order[:count]] < 0]
    high = order[::-1][:count]
    return high[measured.imbalance[high] > 0], low


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, ties shared."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def _span(values: Sequence[float] | np.ndarray) -> str:
    low, high = f"{np.min(values):g}", f"{np.max(values):g}"
    return low if low == high else f"{low} to {high}"
