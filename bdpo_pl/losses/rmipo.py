"""RMiPO: SimPO with a target margin for each pair that depends on the comprehension of its responses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bdpo_pl.losses.base import PairScores, PreferenceLoss, require_not_negative, require_positive


class RMiPOLoss(PreferenceLoss):
    """RMiPO, arXiv:2604.24804, the published loss most similar to Balanced DPO.

    L = −log σ(β·[ℓ̄_w − ℓ̄_l − γ]), ℓ̄ = log π_θ(y|x)/|y|, γ = γ₀ + γ₁·exp(−max(0, c_w − c_l)): the better
    the chosen response is comprehended than the rejected one, the smaller the target margin. γ is a constant in the
    gradient. The rewards in the logs are β·ℓ̄.

    c is the comprehension by `pmi`, nats per token. The paper measures it on the policy. Here it is measured once
    before training on the reference, unless `model.reestimate_every` is set, which measures it again on the policy. The
    loss reads no log-probabilities of the reference, but it needs a reference for the comprehension.

    Args:
        beta: scale of the log-probabilities, β > 0.
        gamma_floor: margin of a pair whose chosen response is comprehended far better, γ₀ ≥ 0, in nats per token.
        gamma_range: largest addition to `gamma_floor`, for a pair whose chosen response is not comprehended better,
            γ₁ ≥ 0, in nats per token.

    Raises:
        InputError: an argument is out of its range.
    """

    needs_reference = False
    needs_comprehension = True

    def __init__(self, beta: float = 2.0, gamma_floor: float = 0.3, gamma_range: float = 1.3) -> None:
        require_positive("beta", beta)
        require_not_negative("gamma_floor", gamma_floor)
        require_not_negative("gamma_range", gamma_range)
        self.beta = beta
        self.gamma_floor = gamma_floor
        self.gamma_range = gamma_range

    def __call__(self, policy_chosen: Tensor, policy_rejected: Tensor, scores: PairScores) -> Tensor:
        """Compute the loss of each pair, (B,) float32."""
        chosen, rejected = scores.mean_logps(policy_chosen, policy_rejected)
        return -F.logsigmoid(self.beta * (chosen - rejected - self.margins(scores)))

    def margins(self, scores: PairScores) -> Tensor:
        """Compute the target margin γ of each pair, (B,) float32, nats per token, without gradient.

        Raises:
            ValueError: the pairs have no comprehension.
        """
        if scores.comprehension_chosen is None or scores.comprehension_rejected is None:
            raise ValueError("RMiPO's margins need comprehension, and these pairs carry none")
        lead = (scores.comprehension_chosen - scores.comprehension_rejected).detach().float()
        return self.gamma_floor + self.gamma_range * torch.exp(-lead.clamp_min(0.0))

    def rewards(self, policy_chosen: Tensor, policy_rejected: Tensor, scores: PairScores) -> tuple[Tensor, Tensor]:
        """Compute β·ℓ̄ of the chosen and of the rejected, (B,) float32 each."""
        chosen, rejected = scores.mean_logps(policy_chosen, policy_rejected)
        return self.beta * chosen, self.beta * rejected
