"""Scores of pairs by a frozen model, and the values that a loss reads from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bdpo_pl.comprehension import Estimator, comprehension
from bdpo_pl.data.splits import PreferenceSplits
from bdpo_pl.data.table import PairTable
from bdpo_pl.losses import PairScores


@dataclass(frozen=True)
class ScoreTable:
    """Scores of M pairs by one frozen model. In each array, row 0 holds the chosen responses, row 1 the rejected ones.

    Attributes:
        reference: (2, M) float32 log π_ref(y | x).
        null: (2, M) float32 log π_ref(y | x₀), or None if comprehension is not measured.
        hsic: (2, M) float32 `normalised_hsic`; None unless the estimator is `hsic`.
        first: (2, M) float32 log π_ref of the first n tokens of each response, where n is the length of the pair's
            shorter response; None unless the loss weighs the remaining tokens.
    """

    reference: np.ndarray
    null: np.ndarray | None = None
    hsic: np.ndarray | None = None
    first: np.ndarray | None = None

    def __len__(self) -> int:
        return self.reference.shape[1]

    def columns(self) -> dict[str, np.ndarray]:
        """Return the arrays that are not None, by name."""
        named = {"reference": self.reference, "null": self.null, "hsic": self.hsic, "first": self.first}
        return {name: array for name, array in named.items() if array is not None}

    @classmethod
    def concatenate(cls, parts: list[ScoreTable]) -> ScoreTable:
        """Join the scores of consecutive pairs."""
        names = parts[0].columns()
        return cls(**{name: np.concatenate([part.columns()[name] for part in parts], axis=1) for name in names})


@dataclass(frozen=True)
class SplitScores:
    """The inputs of a loss besides the policy's log-probabilities, for M pairs: (2, M) float32 each, chosen first.

    Attributes:
        reference: log π_ref(y | x), or None without a reference.
        comprehension: c(x, y) by the loss's estimator, or None if it was not measured.
    """

    reference: Tensor | None = None
    comprehension: Tensor | None = None

    def __getitem__(self, index: Tensor) -> SplitScores:
        """Return the scores of the pairs at `index` (B,)."""
        return self._each(lambda values: values.index_select(1, index))

    def to(self, device: torch.device) -> SplitScores:
        """Return the scores on `device`."""
        return self._each(lambda values: values.to(device))

    def _each(self, function: Callable[[Tensor], Tensor]) -> SplitScores:
        return SplitScores(*(None if t is None else function(t) for t in (self.reference, self.comprehension)))


def table_comprehension(scores: ScoreTable, table: PairTable, estimator: Estimator) -> Tensor:
    """Compute the (2, M) float32 comprehension of the M pairs of `table`; `scores` must include the null prompt."""
    assert scores.null is not None
    lengths = torch.from_numpy(table.trained_lengths)
    hsic = None if scores.hsic is None else torch.from_numpy(scores.hsic)
    return comprehension(estimator, torch.from_numpy(scores.reference), torch.from_numpy(scores.null), lengths, hsic)


def split_scores(
    scores: ScoreTable, table: PairTable, estimator: Estimator, tail_weight: float | None = None
) -> SplitScores:
    """Compute what a loss with `estimator` and `tail_weight` reads, from the scores of the pairs of `table`."""
    measured = None if scores.null is None else table_comprehension(scores, table, estimator)
    reference = torch.from_numpy(scores.reference)
    if tail_weight is not None:
        assert scores.first is not None
        first = torch.from_numpy(scores.first)
        reference = first + tail_weight * (reference - first)
    return SplitScores(reference, measured)


def score_splits(splits: PreferenceSplits, score: Callable[[str, PairTable], SplitScores]) -> dict[str, SplitScores]:
    """Score every split: the training pairs, every held-out set, and the probe, a sample of the training pairs.

    The probe's scores are selected from those of the training pairs, so nothing is scored twice.

    Args:
        splits: the pairs.
        score: function that scores one split, given its name and table.

    Returns:
        Scores by the name of the split.
    """
    found: dict[str, SplitScores] = {}
    found |= {name: score(name, splits.tables[name]) for name in splits.scored}
    if splits.probe_indices is not None:
        probe = torch.from_numpy(splits.probe_indices)
        device = next(t.device for t in vars(found["train"]).values() if t is not None)
        found["train_probe"] = found["train"][probe.to(device)]
    return found


def table_scores(table: PairTable, scores: SplitScores) -> PairScores:
    """Collect lengths and scores of all pairs of `table`, as a loss reads them."""
    nothing = (None, None)
    return PairScores(
        *torch.from_numpy(table.trained_lengths),
        *(scores.reference if scores.reference is not None else nothing),
        *(scores.comprehension if scores.comprehension is not None else nothing),
    )
