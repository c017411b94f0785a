"""Dr.DPO: DPO that gives less weight to pairs with a large loss, because their labels may be flipped."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from bdpo_pl.losses.base import BetaLoss, PairScores, require_positive


class DrDPOLoss(BetaLoss):
    """Dr.DPO, arXiv:2407.07880: L = −β′·log mean exp(log σ(β·[D_w − D_l])/β′), over the pairs of a micro-batch.

    A small β′ nearly ignores pairs that are probably flipped; for β′ → ∞ the loss is DPO. It mixes pairs, so it runs on
    logits (`model.lm_head`), and the weight of a pair depends on the other pairs of its micro-batch on its device:
    gradient accumulation is not equivalent to a larger batch.

    Args:
        beta: scale of the log-ratios, β > 0.
        beta_prime: temperature of the weights of pairs, β′ > 0.
        sft_weight: weight of the chosen response's mean NLL, added to the loss (RPO, arXiv:2404.19733).

    Raises:
        InputError: an argument is out of its range.
    """

    start = math.log(2.0)
    mixes_pairs = True

    def __init__(self, beta: float = 0.1, beta_prime: float = 1.0, sft_weight: float = 0.0) -> None:
        super().__init__(beta, sft_weight)
        require_positive("beta_prime", beta_prime)
        self.beta_prime = beta_prime

    def preference(self, chosen: Tensor, rejected: Tensor, scores: PairScores) -> Tensor:
        """Compute −β′·log mean exp(log σ(β·[D_w − D_l])/β′), the same number for every pair, (B,) float32."""
        logs = F.logsigmoid(self.beta * (chosen - rejected))
        counted = torch.ones_like(logs, dtype=torch.bool) if scores.counted is None else scores.counted
        if not counted.any():
            return 0.0 * logs
        # Of differences from the largest, so that nothing overflows for a small β′; by expm1 and log1p, because for a
        # large β′ the result is a small difference from 1, multiplied by β′.
        largest = logs.detach().masked_fill(~counted, -math.inf).max()
        scaled = ((logs - largest) / self.beta_prime).masked_fill(~counted, 0.0)
        mean = torch.expm1(scaled).sum() / counted.sum()
        return (-largest - self.beta_prime * torch.log1p(mean)).expand_as(logs)
