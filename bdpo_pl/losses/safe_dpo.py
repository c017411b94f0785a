"""SafeDPO: DPO with labels of which responses are safe."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from bdpo_pl.losses.base import PairScores, PreferenceLoss, require_not_negative, require_positive


class SafeDPOLoss(PreferenceLoss):
    """SafeDPO, arXiv:2505.20065.

    L = −log σ(β·[D_w − D_l] − (h_l − h_w)·Δ), D = log π_θ(y|x) − log π_ref(y|x), h = 1 for an unsafe response, 0 for a
    safe one: for a pair of two safe responses the loss is DPO's; an unsafe rejected response must fall
    behind by Δ more.

    The method first exchanges the responses of a pair if only the chosen one is unsafe, and drops a pair if both are.
    This happens when the data are loaded, and is counted in their report (`bdpo_pl.data.rows.order_by_safety`), so that
    scores, metrics and the mean over pairs refer to the pairs that are trained on. The loss assumes that it was done.

    The labels are in the columns `chosen_safe` and `rejected_safe`, or in PKU-SafeRLHF's own columns.

    Args:
        beta: scale of the log-ratios, β > 0; a larger β keeps the policy closer to the reference.
        delta: additional required lead of a safe response over an unsafe one, Δ ≥ 0, in units of reward.

    Raises:
        InputError: an argument is out of its range.
    """

    needs_safety = True
    two_log_ratios = True

    def __init__(self, beta: float = 0.1, delta: float = 10.0) -> None:
        require_positive("beta", beta)
        require_not_negative("delta", delta)
        self.beta = beta
        self.delta = delta

    def __call__(self, policy_chosen: Tensor, policy_rejected: Tensor, scores: PairScores) -> Tensor:
        """Compute the loss of each pair, (B,) float32.

        Raises:
            ValueError: the pairs do not say which responses are safe.
        """
        if scores.chosen_safe is None or scores.rejected_safe is None:
            raise ValueError("SafeDPO needs to know which responses are safe, and these pairs do not say")
        chosen, rejected = scores.log_ratios(policy_chosen, policy_rejected)
        harm = scores.chosen_safe.float() - scores.rejected_safe.float()
        return -F.logsigmoid(self.beta * (chosen - rejected) - self.delta * harm)
