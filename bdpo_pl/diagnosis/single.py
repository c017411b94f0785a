"""Diagnosis of single answers with a label: how the reference rates good and bad ones, and how many there are of each.

Shapes: M answers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from bdpo_pl.data.consistency import count_shared_prompts, first_of_prompt
from bdpo_pl.data.table import PairTable
from bdpo_pl.statistics import Interval, finite, independent, normal

LARGEST_BALANCE = 4 / 3
"""KTO (arXiv:2402.01306) asks for λ_D·n_D / (λ_U·n_U) between 1 and this number."""
MEASURES = {
    "comprehension": "comprehension",
    "logp": "log-probability, nats",
    "logp_per_token": "log-probability per token, nats",
    "tokens": "tokens",
}
_LEAST_FOR_INTERVAL = 10


@dataclass(frozen=True)
class SingleSplit:
    """Measurements of the answers of one split.

    Attributes:
        good: number of good answers.
        bad: number of bad answers.
        means: means of `MEASURES`, by measure and then by `good`, `bad` and `good − bad`, as far as there are answers.
        repeated: number of answers that repeat an earlier one, with its prompt and label.
        contradicted: number of answers that have the other label elsewhere in the split, after the same prompt.
        shared_prompts: number of answers whose prompt is in the training answers; None for these themselves.
    """

    good: int
    bad: int
    means: dict[str, dict[str, Interval]]
    repeated: int
    contradicted: int
    shared_prompts: int | None


@dataclass(frozen=True)
class LabelBalance:
    """KTO's balance of labels: λ_D·n_D / (λ_U·n_U).

    Attributes:
        good: number of good answers n_D.
        bad: number of bad answers n_U.
        value: balance with the weights of the loss; None without bad answers or with a weight of 0 for them.
        option: weight that, changed alone, brings the balance into its range; None if it is there, or cannot be.
        low: smallest such weight.
        high: largest such weight.
    """

    good: int
    bad: int
    value: float | None
    option: str | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class SingleDiagnosis:
    """The whole diagnosis.

    Attributes:
        facts: description of what was measured, by name.
        unit: unit of comprehension.
        splits: measurements by split.
        balance: balance of the training answers' labels.
        notes: remarks about how the data was read.
        estimator: estimator of comprehension, by name.
    """

    facts: dict[str, str]
    unit: str
    splits: dict[str, SingleSplit]
    balance: LabelBalance
    notes: list[str]
    estimator: str = "pmi"

    def to_json(self) -> Any:
        """Return plain JSON values, null where a number is not available."""
        return finite({"format": 1, **asdict(self)})


def measures(table: PairTable, comprehension: np.ndarray, logps: np.ndarray) -> dict[str, np.ndarray]:
    """Return the `MEASURES` of each answer, (M,) each.

    Args:
        table: answers, each as the chosen response of a row.
        comprehension: (2, M) comprehension.
        logps: (2, M) log-probabilities by the reference, in nats.
    """
    tokens = table.trained_lengths[0].astype(np.float64)
    return {
        "comprehension": comprehension[0],
        "logp": logps[0],
        "logp_per_token": logps[0] / tokens,
        "tokens": tokens,
    }


def diagnose_single(table: PairTable, values: Mapping[str, np.ndarray], train: PairTable | None) -> SingleSplit:
    """Summarise the answers of one split.

    Args:
        table: answers with labels.
        values: result of `measures`.
        train: training answers, if `table` is held out.
    """
    assert table.desirable is not None
    good = table.desirable
    prompts, answers = first_of_prompt(table), table.response_digests()[0]
    labels: dict[tuple[int, bytes], set[bool]] = {}
    repeated = 0
    keys = list(zip(prompts, answers, strict=True))
    for key, label in zip(keys, good.tolist(), strict=True):
        repeated += label in labels.setdefault(key, set())
        labels[key].add(label)
    return SingleSplit(
        int(good.sum()),
        int((~good).sum()),
        {name: _means(value[good], value[~good]) for name, value in values.items()},
        repeated,
        sum(len(labels[key]) > 1 for key in keys),
        None if train is None else count_shared_prompts(train, table),
    )


def label_balance(good: int, bad: int, desirable_weight: float, undesirable_weight: float) -> LabelBalance:
    """Compute KTO's balance of labels, and the weight that would bring it into its range.

    The weight of the rarer label is raised, because the other one's is usually 1.

    Args:
        good: number of good answers.
        bad: number of bad answers.
        desirable_weight: weight λ_D of good answers.
        undesirable_weight: weight λ_U of bad answers.
    """
    weighted = undesirable_weight * bad
    value = desirable_weight * good / weighted if weighted else None
    if not good or not bad or value is None or not value or 1.0 <= value <= LARGEST_BALANCE:
        return LabelBalance(good, bad, value)
    if value < 1.0:
        low = weighted / good
        return LabelBalance(good, bad, value, "desirable_weight", low, LARGEST_BALANCE * low)
    high = desirable_weight * good / bad
    return LabelBalance(good, bad, value, "undesirable_weight", high / LARGEST_BALANCE, high)


def _means(good: np.ndarray, bad: np.ndarray) -> dict[str, Interval]:
    """Return the means of both labels and their difference (Welch's standard error), as far as there are values."""
    found = {
        name: independent(values, _LEAST_FOR_INTERVAL) for name, values in (("good", good), ("bad", bad)) if len(values)
    }
    if len(found) < 2:
        return found
    difference, count = found["good"].value - found["bad"].value, len(good) + len(bad)
    if min(len(good), len(bad)) < _LEAST_FOR_INTERVAL:
        return found | {"good − bad": Interval(difference, math.nan, math.nan, count, count)}
    error = math.sqrt(float(good.var(ddof=1)) / len(good) + float(bad.var(ddof=1)) / len(bad))
    return found | {"good − bad": normal(difference, error, count)}
