"""Robust DPO: an unbiased loss under flipped labels."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from bdpo_pl.errors import InputError
from bdpo_pl.losses.base import PairScores, PreferenceLoss, require_not_negative, require_positive


class RobustDPOLoss(PreferenceLoss):
    """rDPO, arXiv:2403.00409: L = [(1−ε)·L(z) − ε·L(−z)]/(1−2ε), L(z) = −log σ(z), z = β·[D_w − D_l].

    Its mean over labels flipped with probability ε is DPO's loss on the true ones.

    Args:
        beta: β > 0.
        epsilon: ε in [0, 0.5), the assumed share of flipped labels.
        sft_weight: weight of the chosen response's mean NLL, added to the loss (RPO, arXiv:2404.19733).

    Raises:
        InputError: an argument is out of its range.
    """

    two_log_ratios = True

    def __init__(self, beta: float = 0.1, epsilon: float = 0.1, sft_weight: float = 0.0) -> None:
        require_positive("beta", beta)
        require_not_negative("sft_weight", sft_weight)
        if not 0.0 <= epsilon < 0.5:
            raise InputError(f"loss: epsilon must be in [0, 0.5), got {epsilon}")
        self.epsilon = epsilon
        self.beta = beta
        self.sft_weight = sft_weight
        self.initial_value = math.log(2.0) if sft_weight == 0.0 else None

    def __call__(self, policy_chosen: Tensor, policy_rejected: Tensor, scores: PairScores) -> Tensor:
        """Compute the loss of each pair, (B,) float32."""
        chosen, rejected = scores.log_ratios(policy_chosen, policy_rejected)
        z = self.beta * (chosen - rejected)
        clean, flipped = -F.logsigmoid(z), -F.logsigmoid(-z)
        losses = ((1.0 - self.epsilon) * clean - self.epsilon * flipped) / (1.0 - 2.0 * self.epsilon)
        return self.with_sft(losses, policy_chosen, scores)
