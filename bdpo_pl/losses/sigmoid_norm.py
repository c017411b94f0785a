"""DPO on log-ratios a token."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from bdpo_pl.losses.base import PairScores, PreferenceLoss, require_not_negative, require_positive


class SigmoidNormLoss(PreferenceLoss):
    """DPO on log-ratios a token, as Tülu 3's (arXiv:2411.15124): L = −log σ(β·[D_w/|y_w| − D_l/|y_l|]).

    TRL's `sigmoid_norm`.

    Args:
        beta: β > 0.
        sft_weight: weight of the chosen response's mean NLL, added to the loss (RPO, arXiv:2404.19733).

    Raises:
        InputError: an argument is out of its range.
    """

    two_log_ratios = True

    def __init__(self, beta: float = 5.0, sft_weight: float = 0.0) -> None:
        require_positive("beta", beta)
        require_not_negative("sft_weight", sft_weight)
        self.beta = beta
        self.sft_weight = sft_weight
        self.initial_value = math.log(2.0) if sft_weight == 0.0 else None

    def __call__(self, policy_chosen: Tensor, policy_rejected: Tensor, scores: PairScores) -> Tensor:
        """Compute the loss of each pair, (B,) float32."""
        chosen, rejected = scores.log_ratios(policy_chosen, policy_rejected)
        difference = chosen / scores.chosen_length - rejected / scores.rejected_length
        return self.with_sft(-F.logsigmoid(self.beta * difference), policy_chosen, scores)
