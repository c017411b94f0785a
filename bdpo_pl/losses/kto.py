"""KTO: each answer is good or bad by itself, measured against how far the policy has drifted on the whole."""

from __future__ import annotations

import torch
from torch import Tensor

from bdpo_pl.losses.base import PairScores, PreferenceLoss, require_not_negative, require_positive


class KTOLoss(PreferenceLoss):
    """KTO, arXiv:2402.01306, equation 7, for single answers with a label, as with TRL's `KTOTrainer`.

    With D = log π_θ(y|x)/π_ref(y|x) of the answer and z₀ = max(0, mean of log π_θ(y′|x)/π_ref(y′|x)), which carries no
    gradient, over the micro-batch, y′ an answer to another prompt:

        L = λ_D·(1 − σ(β·[D − z₀])) for a good answer, λ_U·(1 − σ(β·[z₀ − D])) for a bad one.

    z₀ is that of a micro-batch on its device: gradient accumulation is not equivalent to a larger batch. In the logs,
    the reward of the chosen response is ±β·(D − z₀), above 0 where the policy is on the side of the label, and that of
    the rejected one 0: accuracy is the share on the right side.

    Args:
        beta: β > 0.
        desirable_weight: λ_D ≥ 0, weight of good answers.
        undesirable_weight: λ_U ≥ 0, weight of bad answers; the paper balances λ_D·n_D and λ_U·n_U to 1 to 4/3.

    Raises:
        InputError: an argument is out of its range.
    """

    needs_labels = True
    mixes_pairs = True
    reads_drift = True

    def __init__(self, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> None:
        require_positive("beta", beta)
        require_not_negative("desirable_weight", desirable_weight)
        require_not_negative("undesirable_weight", undesirable_weight)
        self.beta = beta
        self.desirable_weight = desirable_weight
        self.undesirable_weight = undesirable_weight
        self.initial_value = desirable_weight / 2 if desirable_weight == undesirable_weight else None

    def __call__(self, policy_chosen: Tensor, policy_rejected: Tensor, scores: PairScores) -> Tensor:
        """Compute the loss of each answer, (B,) float32."""
        lead = self._lead(policy_chosen, policy_rejected, scores)
        assert scores.desirable is not None
        # In the default dtype they would be rounded under `16-true` and `bf16-true`.
        good, bad = (lead.new_full((), weight) for weight in (self.desirable_weight, self.undesirable_weight))
        weight = torch.where(scores.desirable, good, bad)
        return weight * torch.sigmoid(-lead)

    def rewards(self, policy_chosen: Tensor, policy_rejected: Tensor, scores: PairScores) -> tuple[Tensor, Tensor]:
        """Compute ±β·(D − z₀) of each answer, and zeros."""
        lead = self._lead(policy_chosen, policy_rejected, scores)
        return lead, torch.zeros_like(lead)

    def drift(self, policy_rejected: Tensor, scores: PairScores) -> Tensor:
        """Compute z₀, (B,) float32."""
        rejected = policy_rejected.detach()
        _, others = scores.log_ratios(rejected, rejected)
        counted = torch.ones_like(others) if scores.counted is None else scores.counted.float()
        return ((others * counted).sum() / counted.sum().clamp_min(1.0)).clamp_min(0.0).expand_as(others)

    def _lead(self, policy_chosen: Tensor, policy_rejected: Tensor, scores: PairScores) -> Tensor:
        """Compute how far each answer is on the side of its label, ±β·(D − z₀), (B,) float32."""
        own, _ = scores.log_ratios(policy_chosen, policy_rejected)
        if scores.desirable is None:
            raise ValueError("KTO needs to know which answers are good, and these do not say")
        drift = self.drift(policy_rejected, scores) if scores.drift is None else scores.drift
        return self.beta * torch.where(scores.desirable, own - drift, drift - own)
