"""Dr.DPO: DPO that trusts pairs less whose loss is large."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from bdpo_pl.losses.base import PairScores, PreferenceLoss, require_not_negative, require_positive


class DrDPOLoss(PreferenceLoss):
    """Dr.DPO, arXiv:2407.07880: L = −β′·log mean exp(log σ(β·[D_w − D_l])/β′), over the pairs of a micro-batch.

    Small β′ leaves out pairs that are probably flipped; for β′ → ∞ it is DPO. It mixes pairs, so it runs on logits
    (`model.lm_head`), and what a pair weighs depends on the others of its micro-batch on its device: accumulating is
    not the same as a larger batch.

    Args:
        beta: β > 0.
        beta_prime: β′ > 0.
        sft_weight: weight of the chosen response's mean NLL, added to the loss (RPO, arXiv:2404.19733).

    Raises:
        InputError: an argument is out of its range.
    """

    two_log_ratios = True
    mixes_pairs = True

    def __init__(self, beta: float = 0.1, beta_prime: float = 1.0, sft_weight: float = 0.0) -> None:
        require_positive("beta", beta)
        require_not_negative("sft_weight", sft_weight)
        require_positive("beta_prime", beta_prime)
        self.beta_prime = beta_prime
        self.beta = beta
        self.sft_weight = sft_weight
        self.initial_value = math.log(2.0) if sft_weight == 0.0 else None

    def __call__(self, policy_chosen: Tensor, policy_rejected: Tensor, scores: PairScores) -> Tensor:
        """Compute the loss of each pair, (B,) float32."""
        chosen, rejected = scores.log_ratios(policy_chosen, policy_rejected)
        logs = F.logsigmoid(self.beta * (chosen - rejected)) / self.beta_prime
        counted = torch.ones_like(logs, dtype=torch.bool) if scores.counted is None else scores.counted
        mean = torch.logsumexp(logs.masked_fill(~counted, -math.inf), dim=0) - counted.sum().clamp_min(1).log()
        losses = (-self.beta_prime * mean).expand_as(logs) if counted.any() else 0.0 * logs
        return self.with_sft(losses, policy_chosen, scores)
