"""Hinge loss on DPO's log-ratios."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from bdpo_pl.losses.base import BetaLoss, PairScores


class HingeLoss(BetaLoss):
    """Hinge loss of SLiC-HF (arXiv:2305.10425) on DPO's log-ratios: L = max(0, 1 − β·[D_w − D_l]).

    Args:
        beta: scale of the log-ratios, β > 0.
        sft_weight: weight of the chosen response's mean NLL, added to the loss (RPO, arXiv:2404.19733).

    Raises:
        InputError: an argument is out of its range.
    """

    start = 1.0

    def preference(self, chosen: Tensor, rejected: Tensor, scores: PairScores) -> Tensor:
        """Compute max(0, 1 − β·[D_w − D_l]), (B,) float32."""
        return F.relu(1.0 - self.beta * (chosen - rejected))
