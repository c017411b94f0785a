"""LD-DPO: the tokens of a response beyond the length of the pair's shorter response have a smaller weight."""

from __future__ import annotations

from torch import Tensor

from bdpo_pl.errors import InputError
from bdpo_pl.losses.base import PairScores, PreferenceLoss
from bdpo_pl.losses.combined import Outer, reads_log_ratios


class LDLoss(Outer):
    """LD-DPO, arXiv:2409.06411, equation 10, for any loss of log-ratios: Σ_{t≤l} log π(y_t) + α·Σ_{t>l} log π(y_t).

    l = min(|y_w|, |y_l|). The loss reads log-probabilities of the policy and of the reference that are weighted in this
    way. α = 1 is the loss itself; α = 0 ignores the tokens of one response beyond the length of the other. DPO prefers
    long responses partly because they have more tokens, and this removes that effect. It runs on logits, not fused with
    the LM head. Lengths and comprehension remain those of whole responses.

    Args:
        loss: loss that reads only the two log-ratios of the policy, Balanced DPO, or a sum of such losses.
        alpha: weight α in [0, 1] of the tokens beyond the length of the pair's shorter response.

    Raises:
        InputError: α is out of its range, the loss reads more of the policy than its log-ratios, or weights tokens.
    """

    def __init__(self, loss: PreferenceLoss, alpha: float = 0.5) -> None:
        if not 0.0 <= alpha <= 1.0:
            raise InputError(f"loss: alpha must be in [0, 1], got {alpha}")
        if loss.tail_weight is not None:
            raise InputError("loss: LDLoss is around another LDLoss, whose alpha would change nothing; leave out one")
        if not reads_log_ratios(loss):
            raise InputError(
                f"loss: {type(loss).__name__} as configured reads more of the policy than its two log-ratios, so "
                "LD-DPO does not apply to it"
            )
        self._take_from((loss,))
        self.alpha = self.tail_weight = alpha
        self.initial_value = loss.initial_value
        self.two_log_ratios = loss.two_log_ratios

    def __call__(self, policy_chosen: Tensor, policy_rejected: Tensor, scores: PairScores) -> Tensor:
        """Compute the loss of each pair, (B,) float32, from log-probabilities that are already weighted."""
        return self._parts[0](policy_chosen, policy_rejected, scores)
