"""What a preference loss is given and what it gives: the interface that every loss keeps.

Shapes: B pairs. All log-probabilities are sums over a response's tokens, in nats.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

from torch import Tensor

from bdpo_pl.comprehension import Estimator
from bdpo_pl.errors import InputError


@dataclass(frozen=True)
class PairLogProbs:
    """What a loss may read of B pairs; every tensor is (B,). Only the policy's log-probabilities carry gradients.

    Attributes:
        policy_chosen: log π_θ(y_w | x).
        policy_rejected: log π_θ(y_l | x).
        chosen_length: tokens in the chosen response.
        rejected_length: tokens in the rejected response.
        reference_chosen: log π_ref(y_w | x), or None without a reference.
        reference_rejected: log π_ref(y_l | x), or None without a reference.
        comprehension_chosen: c(x, y_w) by the loss's estimator, or None if it was not measured.
        comprehension_rejected: c(x, y_l), likewise.
        chosen_safe: whether y_w is safe, bool, or None where the data does not say.
        rejected_safe: whether y_l is safe, likewise.
    """

    policy_chosen: Tensor
    policy_rejected: Tensor
    chosen_length: Tensor
    rejected_length: Tensor
    reference_chosen: Tensor | None = None
    reference_rejected: Tensor | None = None
    comprehension_chosen: Tensor | None = None
    comprehension_rejected: Tensor | None = None
    chosen_safe: Tensor | None = None
    rejected_safe: Tensor | None = None

    def __getitem__(self, index: Tensor) -> PairLogProbs:
        """The pairs at `index` (b,)."""
        chosen = {name: tensor[index] for name, tensor in vars(self).items() if tensor is not None}
        return replace(self, **chosen)

    def log_ratios(self) -> tuple[Tensor, Tensor]:
        """(log π_θ/π_ref of the chosen, of the rejected), two (B,) float32 tensors: how far each has drifted.

        Raises:
            ValueError: there are no reference log-probabilities.
        """
        if self.reference_chosen is None or self.reference_rejected is None:
            raise ValueError("log-ratios need reference log-probabilities, and these pairs carry none")
        chosen = self.policy_chosen.float() - self.reference_chosen.float()
        rejected = self.policy_rejected.float() - self.reference_rejected.float()
        return chosen, rejected

    def mean_logps(self) -> tuple[Tensor, Tensor]:
        """(log π_θ(y_w|x)/|y_w|, log π_θ(y_l|x)/|y_l|), two (B,) float32 tensors, nats per token."""
        return self.policy_chosen.float() / self.chosen_length, self.policy_rejected.float() / self.rejected_length


@dataclass(frozen=True)
class PairWeights:
    """Balance weights and scaling factor of B pairs; every tensor is (B,) float32 and carries no gradient."""

    chosen: Tensor
    rejected: Tensor
    scale: Tensor


class PreferenceLoss(ABC):
    """A loss on preference pairs.

    Attributes:
        beta: scale of the implicit reward; β·log(π_θ/π_ref) unless the loss has its own, `rewards`.
        estimator: the comprehension estimator whose values the loss is given.
        needs_reference: the loss reads reference log-probabilities.
        needs_comprehension: the loss reads comprehension.
        needs_safety: the loss reads whether each response is safe, of pairs put in order by it.
        initial_value: the loss of any pair when policy and reference are one model; None if it depends on the pair.
    """

    beta: float
    estimator: Estimator = "pmi"
    needs_reference: bool = True
    needs_comprehension: bool = False
    needs_safety: bool = False
    initial_value: float | None = None

    @abstractmethod
    def __call__(self, pairs: PairLogProbs) -> Tensor:
        """Loss of each pair, (B,) float32; the caller takes the mean."""

    def rewards(self, pairs: PairLogProbs) -> tuple[Tensor, Tensor] | None:
        """Implicit rewards of the chosen and of the rejected, (B,) float32 each, for the logs: margin and accuracy.

        β·log(π_θ/π_ref), or None where there is no reference. A loss without one says what it compares instead.
        """
        if pairs.reference_chosen is None:
            return None
        chosen, rejected = pairs.log_ratios()
        return self.beta * chosen, self.beta * rejected

    def weights(self, pairs: PairLogProbs) -> PairWeights | None:
        """The balance weights the loss applies to `pairs`, for the logs; None for a loss that has none."""
        return None


def require_positive(name: str, value: float) -> None:
    """Raise `InputError` unless `value` of the argument `name` is finite and above 0."""
    if not (value > 0.0 and math.isfinite(value)):
        raise InputError(f"loss: {name} must be a positive number, got {value}")


def require_not_negative(name: str, value: float) -> None:
    """Raise `InputError` unless `value` of the argument `name` is finite and at least 0."""
    if not (value >= 0.0 and math.isfinite(value)):
        raise InputError(f"loss: {name} must be at least 0, got {value}")


TIE = 1e-3
"""Closer than this, in nats, two log-ratios differ by rounding: the policy before training equals its reference."""
