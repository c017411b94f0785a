"""APO: one term for the chosen response and one for the rejected, instead of their difference alone."""

from __future__ import annotations

import torch
from torch import Tensor

from bdpo_pl.losses.base import BetaLoss, PairScores


class APOZeroLoss(BetaLoss):
    """APO-zero, arXiv:2408.06266, equation 7: L = 1 − σ(β·D_w) + σ(β·D_l).

    Meant for chosen responses that are better than the policy's own: it raises the likelihood of the chosen response
    and lowers that of the rejected one.

    Args:
        beta: scale of the log-ratios, β > 0.
        sft_weight: weight of the chosen response's mean NLL, added to the loss (RPO, arXiv:2404.19733).

    Raises:
        InputError: an argument is out of its range.
    """

    start = 1.0

    def preference(self, chosen: Tensor, rejected: Tensor, scores: PairScores) -> Tensor:
        """Compute 1 − σ(β·D_w) + σ(β·D_l), (B,) float32."""
        return 1.0 - torch.sigmoid(self.beta * chosen) + torch.sigmoid(self.beta * rejected)


class APODownLoss(BetaLoss):
    """APO-down, arXiv:2408.06266, equation 8: L = σ(β·D_w) + 1 − σ(β·[D_w − D_l]).

    Meant for chosen responses that are worse than the policy's own: it lowers the likelihood of both responses, that of
    the rejected one more.

    Args:
        beta: scale of the log-ratios, β > 0.
        sft_weight: weight of the chosen response's mean NLL, added to the loss (RPO, arXiv:2404.19733).

    Raises:
        InputError: an argument is out of its range.
    """

    start = 1.0

    def preference(self, chosen: Tensor, rejected: Tensor, scores: PairScores) -> Tensor:
        """Compute σ(β·D_w) + 1 − σ(β·[D_w − D_l]), (B,) float32."""
        return torch.sigmoid(self.beta * chosen) + 1.0 - torch.sigmoid(self.beta * (chosen - rejected))
