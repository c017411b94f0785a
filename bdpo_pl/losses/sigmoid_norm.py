"""DPO on log-ratios per token."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from bdpo_pl.losses.base import BetaLoss, PairScores


class SigmoidNormLoss(BetaLoss):
    """DPO on log-ratios per token, as in Tülu 3 (arXiv:2411.15124): L = −log σ(β·[D_w/|y_w| − D_l/|y_l|]).

    TRL calls it `sigmoid_norm`.

    Args:
        beta: scale of the log-ratios, β > 0.
        sft_weight: weight of the chosen response's mean NLL, added to the loss (RPO, arXiv:2404.19733).

    Raises:
        InputError: an argument is out of its range.
    """

    start = math.log(2.0)

    def __init__(self, beta: float = 5.0, sft_weight: float = 0.0) -> None:
        super().__init__(beta, sft_weight)

    def preference(self, chosen: Tensor, rejected: Tensor, scores: PairScores) -> Tensor:
        """Compute −log σ(β·[D_w/|y_w| − D_l/|y_l|]), (B,) float32."""
        return -F.logsigmoid(self.beta * (chosen / scores.chosen_length - rejected / scores.rejected_length))
