"""Summary numbers of a split: comprehension, imbalance, balance weights and lengths.

Shapes: M pairs; row 0 of a (2, M) array belongs to the chosen responses, row 1 to the rejected ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from bdpo_pl.data.table import PairTable
from bdpo_pl.losses.balanced_dpo import robust_spread, weight_ratios
from bdpo_pl.reporting.format import general
from bdpo_pl.statistics import Interval, independent, spearman

_LENGTH_GROUPS = 6
# Fewer values have no interval.
_LEAST_FOR_INTERVAL = 10
_ROUND_TAUS = (0.1, 0.25, 0.5, 1.0, 2.0)
# A ratio above e^600 is infinite for all purposes, and JSON has no infinity.
_LARGEST_EXPONENT = 600.0


@dataclass(frozen=True)
class Measured:
    """Measurements of the M pairs of a split.

    Attributes:
        table: the pairs.
        comprehension: (2, M) float64 comprehension of each response.
        weights: (2, M) float64 balance weights.
        scale: (M,) float64 scaling factor.
        strong_ratio: smallest ratio of the larger weight to the smaller at which a pair is strongly re-weighted.
    """

    table: PairTable
    comprehension: np.ndarray
    weights: np.ndarray
    scale: np.ndarray
    strong_ratio: float

    @cached_property
    def imbalance(self) -> np.ndarray:
        """Comprehension of the chosen minus that of the rejected response, (M,)."""
        return self.comprehension[0] - self.comprehension[1]

    @cached_property
    def ratio(self) -> np.ndarray:
        """Ratio of the larger weight to the smaller, (M,)."""
        return weight_ratios(self.weights)

    @cached_property
    def strong(self) -> np.ndarray:
        """Flags of the strongly re-weighted pairs, (M,) bool."""
        return self.ratio >= self.strong_ratio

    @cached_property
    def lengths(self) -> np.ndarray:
        """Number of tokens in each response, (2, M) int64."""
        return self.table.trained_lengths.astype(np.int64)


@dataclass(frozen=True)
class Temperature:
    """The effect of a temperature τ: ratio of the larger weight to the smaller, exp(|imbalance| / τ) within a bound.

    Attributes:
        tau: temperature τ of the softmax weighting.
        median: ratio that half of the pairs do not exceed.
        p95: ratio that 95 % of the pairs do not exceed.
        largest: largest ratio of all pairs.
    """

    tau: float
    median: float
    p95: float
    largest: float


@dataclass(frozen=True)
class Group:
    """Numbers of pairs that have something in common.

    Attributes:
        name: name of the group.
        pairs: number of pairs.
        tokens: mean length of their responses.
        chosen: mean comprehension of the chosen responses, ± 1.96 standard errors.
        rejected: mean comprehension of the rejected responses.
        imbalance: mean of chosen − rejected.
        size: mean of the absolute imbalance.
        spread: spread of the imbalance, by the estimator of `tau auto` (`robust_spread`); None for a single pair.
        strong: share of strongly re-weighted pairs.
        strength_chosen: mean of scaling factor × balance weight of the chosen responses; 1 in plain DPO.
        strength_rejected: mean of scaling factor × balance weight of the rejected responses; 1 in plain DPO.
    """

    name: str
    pairs: int
    tokens: float
    chosen: Interval
    rejected: Interval
    imbalance: Interval
    size: float
    spread: float | None
    strong: float
    strength_chosen: float
    strength_rejected: float


@dataclass(frozen=True)
class LengthBias:
    """Measures of how far length reveals the preference. Correlations are Spearman's, None if undefined.

    Attributes:
        chosen_longer: share of pairs whose chosen response has more tokens.
        rejected_longer: share of pairs whose rejected response has more tokens.
        mean_chosen: mean number of tokens in the chosen responses.
        mean_rejected: mean number of tokens in the rejected responses.
        correlation_chosen: correlation of comprehension and length, over the chosen responses.
        correlation_rejected: correlation of comprehension and length, over the rejected responses.
        correlation_imbalance: correlation of the imbalance and the difference in length.
    """

    chosen_longer: float
    rejected_longer: float
    mean_chosen: float
    mean_rejected: float
    correlation_chosen: float | None
    correlation_rejected: float | None
    correlation_imbalance: float | None


def group(measured: Measured, name: str, index: np.ndarray | None = None) -> Group:
    """Summarise the pairs at `index`, or all pairs, as one group; at least one pair."""
    i = np.arange(len(measured.table)) if index is None else index
    strength = measured.scale[i] * measured.weights[:, i]
    return Group(
        name,
        len(i),
        float(measured.lengths[:, i].mean()),
        independent(measured.comprehension[0, i], _LEAST_FOR_INTERVAL),
        independent(measured.comprehension[1, i], _LEAST_FOR_INTERVAL),
        independent(measured.imbalance[i], _LEAST_FOR_INTERVAL),
        float(np.abs(measured.imbalance[i]).mean()),
        robust_spread(measured.imbalance[i].astype(np.float64)) if len(i) > 1 else None,
        float(measured.strong[i].mean()),
        float(strength[0].mean()),
        float(strength[1].mean()),
    )


def suggested_tau(measured: Measured) -> float | None:
    """Return the spread of the imbalance, rounded to two digits, as a value for τ; None if it is negligible."""
    spread = group(measured, "").spread
    return float(f"{spread:.2g}") if spread else None


def temperatures(measured: Measured, tau: float, most: float | None = None) -> list[Temperature]:
    """Return the effects of the `tau` in use, the suggested one and some round ones, in ascending order.

    Args:
        measured: pairs.
        tau: temperature in use.
        most: upper bound on the ratio of the weights; None: there is none.
    """
    sizes = np.abs(measured.imbalance)
    found = {tau, suggested_tau(measured) or tau, *_ROUND_TAUS}
    return [
        Temperature(
            value,
            *(
                min(float(np.exp(min(_LARGEST_EXPONENT, size / value))), math.inf if most is None else most)
                for size in (np.median(sizes), np.quantile(sizes, 0.95), sizes.max())
            ),
        )
        for value in sorted(found)
    ]


def by_category(measured: Measured) -> list[Group]:
    """Return a group for each category, the most imbalanced first; none if no pair has a category."""
    if not any(measured.table.categories):
        return []
    labels, which, counts = np.unique(measured.table.categories, return_inverse=True, return_counts=True)
    members = np.split(np.argsort(which, kind="stable"), np.cumsum(counts)[:-1])
    groups = [group(measured, str(label) or "(none)", index) for label, index in zip(labels, members, strict=True)]
    return sorted(groups, key=lambda g: (-g.size, g.name))


def by_length(measured: Measured) -> list[Group]:
    """Return groups of about equal size by the mean length of a pair's responses, the shortest first."""
    lengths = measured.lengths.mean(axis=0)
    edges = np.unique(np.quantile(lengths, np.linspace(0, 1, _LENGTH_GROUPS + 1)[1:-1]))
    which = np.searchsorted(edges, lengths, side="left")
    members = [np.flatnonzero(which == k) for k in np.unique(which)]
    return [group(measured, _span(lengths[index]), index) for index in members]


def length_bias(measured: Measured) -> LengthBias:
    """Compute the `LengthBias` of the pairs."""
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


def extremes(measured: Measured, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of up to `count` pairs of highest and of lowest imbalance, the most extreme first.

    No pair is in both arrays, and no array contains an imbalance of the wrong sign.
    """
    order = np.argsort(measured.imbalance, kind="stable")
    low = order[:count][measured.imbalance[order[:count]] < 0]
    high = order[::-1][:count]
    return high[measured.imbalance[high] > 0], low


def _span(values: Sequence[float] | np.ndarray) -> str:
    low, high = general(float(np.min(values))), general(float(np.max(values)))
    return low if low == high else f"{low} to {high}"
