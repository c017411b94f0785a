"""AdaDPO: weights of the two sides that depend only on the policy, without mutual information."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from bdpo_pl.errors import InputError
from bdpo_pl.losses.base import PairScores, PreferenceLoss, require_not_negative, require_positive


class AdaDPOLoss(PreferenceLoss):
    """AdaDPO, arXiv:2605.28440: L = −log σ(β_w·D_w − β·D_l), β_w = β·clip(exp(ℓ̄_w − ℓ̄_l), 1/C, C).

    ℓ̄ = log π_θ(y|x)/|y|; β_w is a constant in the gradient. Its weights differ between the two sides but do
    not depend on comprehension, which makes it the control for Balanced DPO. The formula comes from a secondary source,
    and was not compared with the authors' code.

    Args:
        beta: scale of the log-ratios, β > 0.
        clip: largest allowed ratio between the two sides, C ≥ 1.
        sft_weight: weight of the chosen response's mean NLL, added to the loss (RPO, arXiv:2404.19733).

    Raises:
        InputError: an argument is out of its range.
    """

    def __init__(self, beta: float = 0.1, clip: float = 2.0, sft_weight: float = 0.0) -> None:
        require_positive("beta", beta)
        require_not_negative("sft_weight", sft_weight)
        if not clip >= 1.0:
            raise InputError(f"loss: clip must be at least 1, got {clip}")
        self.clip = clip
        self.beta = beta
        self.sft_weight = sft_weight
        self.initial_value = math.log(2.0) if sft_weight == 0.0 else None

    def __call__(self, policy_chosen: Tensor, policy_rejected: Tensor, scores: PairScores) -> Tensor:
        """Compute the loss of each pair, (B,) float32."""
        chosen, rejected = scores.log_ratios(policy_chosen, policy_rejected)
        lead = torch.sub(*scores.mean_logps(policy_chosen.detach(), policy_rejected.detach()))
        factor = lead.exp().clamp(1.0 / self.clip, self.clip)
        losses = -F.logsigmoid(self.beta * (factor * chosen - rejected))
        return self.with_sft(losses, policy_chosen, scores)
