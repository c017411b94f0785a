"""The interface of a preference loss: what it reads and what it returns.

Shapes: B pairs. All log-probabilities are sums over a response's tokens, in nats.
"""

from __future__ import annotations

import inspect
import math
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

from torch import Tensor

from bdpo_pl.comprehension import Estimator
from bdpo_pl.errors import InputError

_PAPER = re.compile(r"arXiv:(\d{4}\.\d{4,5})")


@dataclass(frozen=True)
class PairScores:
    """Lengths and known scores of B pairs, which do not depend on the policy; every tensor is (B,), without gradient.

    Attributes:
        chosen_length: number of tokens in the chosen response.
        rejected_length: number of tokens in the rejected response.
        reference_chosen: log π_ref(y_w | x), or None without a reference.
        reference_rejected: log π_ref(y_l | x), or None without a reference.
        comprehension_chosen: c(x, y_w) by the loss's estimator, or None if it was not measured.
        comprehension_rejected: c(x, y_l), or None if it was not measured.
        chosen_safe: bool, true if y_w is safe; None if the data does not say.
        rejected_safe: bool, true if y_l is safe; None if the data does not say.
        counted: bool, false for a pair that only fills up a batch and has no weight in the loss; None: all count.
        desirable: bool, of a single answer, which is `chosen` whether it is good or bad, while `rejected` answers
            another prompt: true if it is good. None for pairs.
        drift: `PreferenceLoss.drift` of the whole micro-batch, if these pairs are only some of it; else None.
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
    desirable: Tensor | None = None
    drift: Tensor | None = None

    def __len__(self) -> int:
        return len(self.chosen_length)

    def __getitem__(self, index: Tensor) -> PairScores:
        """Return the scores of the pairs at `index` (b,)."""
        chosen = {name: tensor[index] for name, tensor in vars(self).items() if tensor is not None}
        return replace(self, **chosen)

    def log_ratios(self, policy_chosen: Tensor, policy_rejected: Tensor) -> tuple[Tensor, Tensor]:
        """Compute log π_θ/π_ref of the chosen and of the rejected responses: how far each has drifted.

        Args:
            policy_chosen: (B,) log π_θ(y_w | x).
            policy_rejected: (B,) log π_θ(y_l | x).

        Returns:
            Two (B,) float32 tensors.

        Raises:
            ValueError: the pairs have no reference log-probabilities.
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
    """Balance weights and scaling factor of B pairs; every tensor is (B,) float32, without gradient."""

    chosen: Tensor
    rejected: Tensor
    scale: Tensor


class PreferenceLoss(ABC):
    """A loss on preference pairs.

    Attributes:
        beta: scale of the implicit reward; β·log(π_θ/π_ref) unless the loss has its own, `rewards`.
        estimator: estimator of the comprehension that the loss reads.
        needs_reference: true if the loss reads reference log-probabilities.
        needs_comprehension: true if the loss reads comprehension.
        needs_safety: true if the loss reads whether each response is safe; pairs then have the safer response first.
        needs_labels: true if the loss reads single answers with a label, and no pairs.
        needs_all_pairs: true if `prepare` must see the scores of all training pairs before training.
        two_log_ratios: true if the loss reads only the two log-ratios of the policy, which balance weights can scale.
        mixes_pairs: true if the loss of a pair depends on the others in its micro-batch. It then cannot be computed a
            few pairs at a time, fused with the LM head, unless it `reads_drift`.
        reads_drift: true if the loss reads rejected responses, and other pairs, only in `drift`, which has no gradient.
        sft_weight: weight of the chosen response's mean NLL, added to the loss.
        tail_weight: weight of a response's tokens beyond the length of the shorter one of its pair, in the policy's and
            the reference's log-probabilities; None: all tokens count alike, and the loss can be fused.
        initial_value: loss of any pair while policy and reference are the same model; None if it depends on the pair.
    """

    beta: float
    estimator: Estimator = "pmi"
    needs_reference: bool = True
    needs_comprehension: bool = False
    needs_safety: bool = False
    needs_labels: bool = False
    needs_all_pairs: bool = False
    two_log_ratios: bool = False
    mixes_pairs: bool = False
    reads_drift: bool = False
    sft_weight: float = 0.0
    tail_weight: float | None = None
    initial_value: float | None = None

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        own = cls.__dict__.get("__call__")
        if own is not None and len(inspect.signature(own).parameters) == 2:
            raise InputError(
                f"loss: {cls.__name__}.__call__ takes one argument, as in early versions; write "
                "__call__(self, policy_chosen, policy_rejected, scores), and rewards likewise (docs/training.md)"
            )

    @property
    def not_fused(self) -> str | None:
        """Reason why the loss cannot be computed a few pairs at a time, fused with the LM head; None if it can."""
        if self.mixes_pairs and not self.reads_drift:
            return "the loss of a pair depends on the others of its batch"
        if self.tail_weight is not None:
            return "the loss weights the tokens of a response, but the fused head returns only their sum"
        return None

    def papers(self) -> list[str]:
        """Return the arXiv numbers of the papers to cite.

        They are those in the first paragraph of the class's docstring and, with `sft_weight`, the source of that term.
        """
        of_sft = papers_in(PreferenceLoss.with_sft.__doc__) if self.sft_weight else []
        return list(dict.fromkeys([*papers_in(type(self).__doc__), *of_sft]))

    @abstractmethod
    def __call__(self, policy_chosen: Tensor, policy_rejected: Tensor, scores: PairScores) -> Tensor:
        """Compute the loss of each pair; the caller averages them.

        Args:
            policy_chosen: (B,) log π_θ(y_w | x), with gradients.
            policy_rejected: (B,) log π_θ(y_l | x), with gradients.
            scores: lengths and known scores of the pairs.

        Returns:
            (B,) float32.
        """

    def with_sft(self, losses: Tensor, policy_chosen: Tensor, scores: PairScores) -> Tensor:
        """Add `sft_weight` times the chosen response's NLL per token, as RPO does (arXiv:2404.19733).

        Args:
            losses: (B,) losses without this term.
            policy_chosen: (B,) log π_θ(y_w | x).
            scores: lengths and known scores of the pairs.
        """
        if self.sft_weight == 0.0:
            return losses
        return losses - self.sft_weight * policy_chosen.float() / scores.chosen_length

    def rewards(
        self, policy_chosen: Tensor, policy_rejected: Tensor, scores: PairScores
    ) -> tuple[Tensor, Tensor] | None:
        """Compute the implicit rewards of the chosen and of the rejected responses, (B,) float32 each, for the logs.

        They are β·log(π_θ/π_ref), or None without reference scores. A loss that reads no reference overrides this with
        the quantities that it compares.
        """
        if scores.reference_chosen is None:
            return None
        chosen, rejected = scores.log_ratios(policy_chosen, policy_rejected)
        return self.beta * chosen, self.beta * rejected

    def drift(self, policy_rejected: Tensor, scores: PairScores) -> Tensor:
        """Compute what a loss that `reads_drift` reads of a micro-batch, (B,) float32, the same number for every pair.

        Args:
            policy_rejected: (B,) log π_θ(y_l | x), without gradients.
            scores: lengths and known scores of the pairs.
        """
        raise NotImplementedError(f"{type(self).__name__} reads no drift")

    def weights(self, scores: PairScores) -> PairWeights | None:
        """Compute the balance weights of the pairs; None for a loss without balance weights."""
        return None

    def prepare(self, scores: PairScores) -> None:  # noqa: B027 - most losses have nothing to do
        """Compute, before training, whatever the loss needs from the scores of all training pairs."""

    def state_dict(self) -> dict[str, float]:
        """Return the results of `prepare`, for checkpoints, the log and the report."""
        return {}

    def load_state_dict(self, state: dict[str, float]) -> None:  # noqa: B027 - likewise
        """Restore the results of `prepare` from a checkpoint.

        Raises:
            InputError: the checkpoint lacks a value that this loss needs.
        """


class BetaLoss(PreferenceLoss):
    """A loss of the two log-ratios whose arguments are β and the weight of the chosen response's NLL.

    A subclass defines the formula, `preference`, and its value before training, `start`.

    Attributes:
        start: value of `preference` for any pair while policy and reference are the same model.

    Args:
        beta: scale of the log-ratios, β > 0.
        sft_weight: weight of the chosen response's mean NLL, added to the loss (RPO, arXiv:2404.19733).

    Raises:
        InputError: an argument is out of its range.
    """

    two_log_ratios = True
    start: float

    def __init__(self, beta: float = 0.1, sft_weight: float = 0.0) -> None:
        require_positive("beta", beta)
        require_not_negative("sft_weight", sft_weight)
        self.beta = beta
        self.sft_weight = sft_weight
        # The chosen response's NLL differs from pair to pair.
        self.initial_value = self.start if sft_weight == 0.0 else None

    @abstractmethod
    def preference(self, chosen: Tensor, rejected: Tensor, scores: PairScores) -> Tensor:
        """Compute the loss of each pair without the chosen response's NLL, (B,) float32.

        Args:
            chosen: (B,) float32, D_w = log π_θ(y_w|x) − log π_ref(y_w|x).
            rejected: (B,) float32, D_l = log π_θ(y_l|x) − log π_ref(y_l|x).
            scores: lengths and known scores of the pairs.
        """

    def __call__(self, policy_chosen: Tensor, policy_rejected: Tensor, scores: PairScores) -> Tensor:
        """Compute the loss of each pair, (B,) float32."""
        chosen, rejected = scores.log_ratios(policy_chosen, policy_rejected)
        return self.with_sft(self.preference(chosen, rejected, scores), policy_chosen, scores)


def require_positive(name: str, value: float) -> None:
    """Raise `InputError` unless `value` of the argument `name` is finite and above 0."""
    if not (value > 0.0 and math.isfinite(value)):
        raise InputError(f"loss: {name} must be a positive number, got {value}")


def require_not_negative(name: str, value: float) -> None:
    """Raise `InputError` unless `value` of the argument `name` is finite and at least 0."""
    if not (value >= 0.0 and math.isfinite(value)):
        raise InputError(f"loss: {name} must be at least 0, got {value}")


TIE = 1e-3
"""Difference of two log-ratios in nats below which they are equal: before training, only rounding separates them."""


def papers_in(docstring: str | None) -> list[str]:
    """Return the arXiv numbers in the first paragraph of `docstring`."""
    return _PAPER.findall((docstring or "").split("\n\n")[0])
