"""IPO: a squared distance instead of DPO's log-sigmoid."""

from __future__ import annotations

from torch import Tensor

from bdpo_pl.losses.base import PairScores, PreferenceLoss, require_positive


class IPOLoss(PreferenceLoss):
    """IPO, arXiv:2310.12036, its equation 17 on length-normalised log-ratios.

    L = (D_w/|y_w| − D_l/|y_l| − 1/(2β))², D = log π_θ(y|x) − log π_ref(y|x); β is the paper's τ.

    The paper writes D without the division. TRL, having asked the authors, reports that they computed it per token, as
    its `loss_type="ipo"` does. The rewards in the logs are β·D, as for DPO.

    Args:
        beta: strength of regularisation, β > 0; the target margin is 1/(2β). The default is TRL's.

    Raises:
        InputError: β is out of its range.
    """

    two_log_ratios = True

    def __init__(self, beta: float = 0.1) -> None:
        require_positive("beta", beta)
        self.beta = beta
        self.initial_value = (0.5 / beta) ** 2

    def __call__(self, policy_chosen: Tensor, policy_rejected: Tensor, scores: PairScores) -> Tensor:
        """Compute the loss of each pair, (B,) float32."""
        chosen, rejected = scores.log_ratios(policy_chosen, policy_rejected)
        difference = chosen / scores.chosen_length - rejected / scores.rejected_length
        return (difference - 0.5 / self.beta).square()
