"""Robust DPO: a loss that is unbiased although some labels are flipped."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from bdpo_pl.errors import InputError
from bdpo_pl.losses.base import BetaLoss, PairScores


class RobustDPOLoss(BetaLoss):
    """rDPO, arXiv:2403.00409: L = [(1−ε)·L(z) − ε·L(−z)]/(1−2ε), L(z) = −log σ(z), z = β·[D_w − D_l].

    Its expected value, if each label is flipped with probability ε, is DPO's loss on the true labels.

    Args:
        beta: scale of the log-ratios, β > 0; a larger β keeps the policy closer to the reference.
        epsilon: assumed share of flipped labels, ε in [0, 0.5).
        sft_weight: weight of the chosen response's mean NLL, added to the loss (RPO, arXiv:2404.19733).

    Raises:
        InputError: an argument is out of its range.
    """

    start = math.log(2.0)

    def __init__(self, beta: float = 0.1, epsilon: float = 0.1, sft_weight: float = 0.0) -> None:
        super().__init__(beta, sft_weight)
        if not 0.0 <= epsilon < 0.5:
            raise InputError(f"loss: epsilon must be in [0, 0.5), got {epsilon}")
        self.epsilon = epsilon

    def preference(self, chosen: Tensor, rejected: Tensor, scores: PairScores) -> Tensor:
        """Compute [(1−ε)·L(z) − ε·L(−z)]/(1−2ε), (B,) float32."""
        z = self.beta * (chosen - rejected)
        clean, flipped = -F.logsigmoid(z), -F.logsigmoid(-z)
        return ((1.0 - self.epsilon) * clean - self.epsilon * flipped) / (1.0 - 2.0 * self.epsilon)
