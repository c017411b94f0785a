"""What the frozen model says of every pair of a table."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ScoreTable:
    """Scores of M pairs by one frozen model; row 0 of each array is the chosen response's, row 1 the rejected's.

    Attributes:
        reference: (2, M) float32 log π_ref(y | x).
        null: (2, M) float32 log π_ref(y | x₀), or None if comprehension was not asked for.
        hsic: (2, M) float32 `normalised_hsic`, or None unless the `hsic` estimator was asked for.
    """

    reference: np.ndarray
    null: np.ndarray | None = None
    hsic: np.ndarray | None = None

    def __len__(self) -> int:
        return self.reference.shape[1]

    def columns(self) -> dict[str, np.ndarray]:
        """The arrays that are there, by name."""
        named = {"reference": self.reference, "null": self.null, "hsic": self.hsic}
        return {name: array for name, array in named.items() if array is not None}

    @classmethod
    def concatenate(cls, parts: list[ScoreTable]) -> ScoreTable:
        """Join the scores of consecutive pairs."""
        names = parts[0].columns()
        return cls(**{name: np.concatenate([part.columns()[name] for part in parts], axis=1) for name in names})
