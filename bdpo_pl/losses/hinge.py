"""Hinge: DPO's log-ratios under a hinge."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from bdpo_pl.losses.base import PairScores, PreferenceLoss, require_not_negative, require_positive


class HingeLoss(PreferenceLoss):
    """Hinge loss of SLiC-HF (arXiv:2305.10425) on DPO's log-ratios: L = max(0, 1 − β·[D_w − D_l]).

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
        losses = F.relu(1.0 - self.beta * (chosen - rejected))
        return self.with_sft(losses, policy_chosen, scores)
