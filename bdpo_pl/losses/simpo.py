"""SimPO: a target margin between log-probabilities per token."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from bdpo_pl.losses.base import PairScores, PreferenceLoss, require_not_negative, require_positive


class SimPOLoss(PreferenceLoss):
    """SimPO, arXiv:2405.14734.

    L = −log σ(β·[ℓ̄_w − ℓ̄_l] − γ), ℓ̄ = log π_θ(y|x)/|y|. It reads no reference. The rewards in the logs are β·ℓ̄,
    as in the paper and in TRL.

    Args:
        beta: scale of the log-probabilities, β > 0. The default is the paper's for Mistral-Instruct.
        gamma_beta_ratio: target margin in nats per token, γ/β ≥ 0, which the paper tunes. The default is the
            paper's for Mistral-Instruct.

    Raises:
        InputError: an argument is out of its range.
    """

    needs_reference = False

    def __init__(self, beta: float = 2.5, gamma_beta_ratio: float = 0.1) -> None:
        require_positive("beta", beta)
        require_not_negative("gamma_beta_ratio", gamma_beta_ratio)
        self.beta = beta
        self.gamma_beta_ratio = gamma_beta_ratio

    def __call__(self, policy_chosen: Tensor, policy_rejected: Tensor, scores: PairScores) -> Tensor:
        """Compute the loss of each pair, (B,) float32."""
        chosen, rejected = scores.mean_logps(policy_chosen, policy_rejected)
        return -F.logsigmoid(self.beta * (chosen - rejected - self.gamma_beta_ratio))

    def rewards(self, policy_chosen: Tensor, policy_rejected: Tensor, scores: PairScores) -> tuple[Tensor, Tensor]:
        """Compute β·ℓ̄ of the chosen and of the rejected, (B,) float32 each."""
        chosen, rejected = scores.mean_logps(policy_chosen, policy_rejected)
        return self.beta * chosen, self.beta * rejected
