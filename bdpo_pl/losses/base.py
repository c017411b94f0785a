"""The interface that every preference loss keeps: what it reads and what it gives.

Shapes: B pairs. All log-probabilities are sums over a response's tokens, in nats.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from bdpo_pl.comprehension import Estimator
from bdpo_pl.errors import InputError


@dataclass(frozen=True)
class PairScores:
    """What is known of B pairs before the policy is asked; every tensor is (B,) and carries no gradient.

    Attributes:
        chosen_length: tokens in the chosen response.
        rejected_length: tokens in the rejected response.
        reference_chosen: log π_ref(y_w | x), or None without a reference.
        reference_rejected: log π_ref(y_l | x), or None without a reference.
        comprehension_chosen: c(x, y_w) by the loss's estimator, or None if it was not measured.
        comprehension_rejected: c(x, y_l), likewise.
        chosen_safe: whether y_w is safe, bool, or None where the data does not say.
        rejected_safe: whether y_l is safe, likewise.
        counted: bool, false for a pair that only fills a batch and has no weight in the loss; None: all count.
    """

    chosen_length: Tensor
    rejected_length: Tensor
    reference_chosen: Tensor | None = None
    reference_rejected: Tensor | None = None
    comprehension_chosen: Tensor | None = None
    comprehension_rejected: Tensor | None = None
    chosen_safe: Tensor | None = None
    rejected_safe: Tensor | None = None
    counted: Tensor | None = None

    def __len__(self) -> int:
        return len(self.chosen_length)

    def __getitem__(self, index: Tensor) -> PairScores:
        """Give the scores of the pairs at `index` (b,)."""
        chosen = {name: tensor[index] for name, tensor in vars(self).items() if tensor is not None}
        return replace(self, **chosen)

    def log_ratios(self, policy_chosen: Tensor, policy_rejected: Tensor) -> tuple[Tensor, Tensor]:
        """Compute log π_θ/π_ref of the chosen and of the rejected: how far each has drifted.

        Args:
            policy_chosen: (B,) log π_θ(y_w | x).
            policy_rejected: (B,) log π_θ(y_l | x).

        Returns:
            Two (B,) float32 tensors.

        Raises:
            ValueError: there are no reference log-probabilities.
        """
        if self.reference_chosen is None or self.reference_rejected is None:
            raise ValueError("log-ratios need reference log-probabilities, and these pairs carry none")
        chosen = policy_chosen.float() - self.reference_chosen.float()
        rejected = policy_rejected.float() - self.reference_rejected.float()
        return chosen, rejected

    def mean_logps(self, policy_chosen: Tensor, policy_rejected: Tensor) -> tuple[Tensor, Tensor]:
        """Compute log π_θ(y_w|x)/|y_w| and log π_θ(y_l|x)/|y_l|, two (B,) float32 tensors, nats per token."""
        return policy_chosen.float() / self.chosen_length, policy_rejected.float() / self.rejected_length


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
        needs_all_pairs: the loss is to `prepare` from the scores of all training pairs.
        two_log_ratios: the loss reads the policy in the two log-ratios alone, which balance weights can scale.
        mixes_pairs: the loss of a pair depends on the others of its micro-batch, so that it cannot be computed a few
            pairs at a time, fused with the LM head.
        sft_weight: weight of the chosen response's mean NLL, added to the loss.
        tail_weight: weight of a response's tokens beyond the length of the shorter one of its pair, in the policy's and
            the reference's log-probabilities; None: all tokens count alike, and the loss can be fused.
        initial_value: the loss of any pair when policy and reference are one model; None if it depends on the pair.
    """

    beta: float
    estimator: Estimator = "pmi"
    needs_reference: bool = True
    needs_comprehension: bool = False
    needs_safety: bool = False
    needs_all_pairs: bool = False
    two_log_ratios: bool = False
    mixes_pairs: bool = False
    sft_weight: float = 0.0
    tail_weight: float | None = None
    initial_value: float | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = cls.__dict__.get("__call__")
        if own is not None and len(inspect.signature(own).parameters) == 2:
            raise InputError(
                f"loss: {cls.__name__}.__call__ takes one argument, as before there was PairScores; write "
                "__call__(self, policy_chosen, policy_rejected, scores), and rewards alike (docs/training.md)"
            )

    @property
    def not_fused(self) -> str | None:
        """Why the loss cannot be computed a few pairs at a time, in one operation with the LM head; None: it can."""
        if self.mixes_pairs:
            return "the loss of a pair depends on the others of its batch"
        if self.tail_weight is not None:
            return "the loss weighs the tokens of a response, of which the fused head gives the sum"
        return None

    @abstractmethod
    def __call__(self, policy_chosen: Tensor, policy_rejected: Tensor, scores: PairScores) -> Tensor:
        """Compute the loss of each pair; the caller takes the mean.

        Args:
            policy_chosen: (B,) log π_θ(y_w | x), with gradients.
            policy_rejected: (B,) log π_θ(y_l | x), with gradients.
            scores: what is known of the pairs.

        Returns:
            (B,) float32.
        """

    def with_sft(self, losses: Tensor, policy_chosen: Tensor, scores: PairScores) -> Tensor:
        """Add `sft_weight` times the chosen response's NLL a token, as RPO does (arXiv:2404.19733).

        Args:
            losses: (B,) losses of the preference alone.
            policy_chosen: (B,) log π_θ(y_w | x).
            scores: what is known of the pairs.
        """
        if self.sft_weight == 0.0:
            return losses
        return losses - self.sft_weight * policy_chosen.float() / scores.chosen_length

    def rewards(
        self, policy_chosen: Tensor, policy_rejected: Tensor, scores: PairScores
    ) -> tuple[Tensor, Tensor] | None:
        """Compute the implicit rewards of the chosen and of the rejected, (B,) float32 each, for the logs.

        β·log(π_θ/π_ref), or None where there is no reference. A loss without one says what it compares instead.
        """
        if scores.reference_chosen is None:
            return None
        chosen, rejected = scores.log_ratios(policy_chosen, policy_rejected)
        return self.beta * chosen, self.beta * rejected

    def weights(self, scores: PairScores) -> PairWeights | None:
        """Compute the balance weights that the loss applies to the pairs; None for a loss that has none."""
        return None

    def prepare(self, scores: PairScores) -> None:  # noqa: B027 - most losses have nothing to do
        """Take from the scores of all training pairs what the loss needs to know of them, before training."""

    def state_dict(self) -> dict[str, float]:
        """Give what `prepare` has found: it goes into checkpoints, the log and the report."""
        return {}

    def load_state_dict(self, state: dict[str, float]) -> None:  # noqa: B027 - likewise
        """Take up what a checkpoint holds of `state_dict`.

        Raises:
            InputError: this loss needs what the checkpoint lacks.
        """


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
