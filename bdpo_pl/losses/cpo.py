"""CPO: DPO with a uniform reference, plus the NLL of the chosen response."""

from __future__ import annotations

from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor

from bdpo_pl.errors import InputError
from bdpo_pl.losses.base import PairScores, PreferenceLoss, require_not_negative, require_positive

NLL = Literal["mean", "sum"]


class CPOLoss(PreferenceLoss):
    """CPO, arXiv:2401.08417.

    L = −log σ(β·[log π_θ(y_w|x) − log π_θ(y_l|x)]) + α·NLL(y_w). It reads no reference. The rewards in the logs are
    β·log π_θ(y|x), as in TRL.

    The paper writes NLL(y_w) = −log π_θ(y_w|x), a sum over the response (`nll: sum`). TRL and Liger divide
    instead by the number of all chosen tokens in a micro-batch, so that a pair's weight depends on the other pairs in
    it. Here `mean` divides by the pair's own length. The two agree if all chosen responses have the same length, and
    only this one keeps the mean over pairs exact under gradient accumulation.

    Args:
        beta: scale of the log-probabilities, β > 0.
        alpha: weight of the NLL, α ≥ 0.
        nll: reduction of the NLL over the tokens of the chosen response: `mean` or `sum`.

    Raises:
        InputError: an argument is out of its range.
    """

    needs_reference = False

    def __init__(self, beta: float = 0.1, alpha: float = 1.0, nll: NLL = "mean") -> None:
        require_positive("beta", beta)
        require_not_negative("alpha", alpha)
        if nll not in get_args(NLL):
            raise InputError(f"loss: unknown nll {nll!r}; choose one of {', '.join(get_args(NLL))}")
        self.beta = beta
        self.alpha = alpha
        self.nll: NLL = nll

    def __call__(self, policy_chosen: Tensor, policy_rejected: Tensor, scores: PairScores) -> Tensor:
        """Compute the loss of each pair, (B,) float32."""
        chosen, rejected = self.rewards(policy_chosen, policy_rejected, scores)
        nll = -scores.mean_logps(policy_chosen, policy_rejected)[0] if self.nll == "mean" else -policy_chosen.float()
        return -F.logsigmoid(chosen - rejected) + self.alpha * nll

    def rewards(self, policy_chosen: Tensor, policy_rejected: Tensor, scores: PairScores) -> tuple[Tensor, Tensor]:
        """Compute β·log π_θ(y|x) of the chosen and of the rejected, (B,) float32 each."""
        return self.beta * policy_chosen.float(), self.beta * policy_rejected.float()
