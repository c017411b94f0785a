"""APO: the chosen and the rejected response each pulled to its own side."""

from __future__ import annotations

import torch
from torch import Tensor

from bdpo_pl.losses.base import PairScores, PreferenceLoss, require_not_negative, require_positive


class APOZeroLoss(PreferenceLoss):
    """APO-zero, arXiv:2408.06266, equation 7: L = 1 − σ(β·D_w) + σ(β·D_l).

    For chosen responses that are better than the policy's own: the chosen gains and the rejected loses likelihood.

    Args:
        beta: β > 0.
        sft_weight: weight of the chosen response's mean NLL, added to the loss (RPO, arXiv:2404.19733).

    Raises:
        InputError: an argument is out of its range.
    """

    two_log_ratios = True

    def __init__(self, beta: float = 0.1, sft_weight: float = 0.0) -> None:
        require_positive("beta", beta)
        require_not_negative("sft_weight", sft_weight)
        self.beta = beta
        self.sft_weight = sft_weight
        self.initial_value = 1.0 if sft_weight == 0.0 else None

    def __call__(self, policy_chosen: Tensor, policy_rejected: Tensor, scores: PairScores) -> Tensor:
        """Compute the loss of each pair, (B,) float32."""
        chosen, rejected = scores.log_ratios(policy_chosen, policy_rejected)
        losses = 1.0 - torch.sigmoid(self.beta * chosen) + torch.sigmoid(self.beta * rejected)
        return self.with_sft(losses, policy_chosen, scores)


class APODownLoss(PreferenceLoss):
    """APO-down, arXiv:2408.06266, equation 8: L = σ(β·D_w) + 1 − σ(β·[D_w − D_l]).

    For chosen responses that are worse than the policy's own: both lose likelihood, the rejected more.

    Args:
        beta: β > 0.
        sft_weight: weight of the chosen response's mean NLL, added to the loss (RPO, arXiv:2404.19733).

    Raises:
        InputError: an argument is out of its range.
    """

    two_log_ratios = True

    def __init__(self, beta: float = 0.1, sft_weight: float = 0.0) -> None:
        require_positive("beta", beta)
        require_not_negative("sft_weight", sft_weight)
        self.beta = beta
        self.sft_weight = sft_weight
        self.initial_value = 1.0 if sft_weight == 0.0 else None

    def __call__(self, policy_chosen: Tensor, policy_rejected: Tensor, scores: PairScores) -> Tensor:
        """Compute the loss of each pair, (B,) float32."""
        chosen, rejected = scores.log_ratios(policy_chosen, policy_rejected)
        losses = torch.sigmoid(self.beta * chosen) + 1.0 - torch.sigmoid(self.beta * (chosen - rejected))
        return self.with_sft(losses, policy_chosen, scores)
