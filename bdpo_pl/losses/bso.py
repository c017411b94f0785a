"""BSO: losses built from a generator function of the ratio between the safe and the unsafe response."""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from bdpo_pl.errors import InputError
from bdpo_pl.losses.base import PairScores, PreferenceLoss, require_not_negative, require_positive

Generator = Literal["basu", "logistic"]

# Beyond them `basu` is a straight line. Float32 ends at exp(88).
_LARGEST_LOG_RATIO, _LARGEST_EXPONENT = 30.0, 80.0


class BSOLoss(PreferenceLoss):
    """BSO, arXiv:2605.12339, of log R = −(β·[D_w − D_l] + C·(s_w − s_l)), s = 1 for an unsafe response.

    `basu`: L = [λR^(1+λ) − (1+λ)R^(−λ) + 1]/(s·λ(1+λ)), s = 4; as a straight line where |log R| > 30, or 80/(1 + λ) if
    that is less, because the powers leave float32. `logistic`: L = log(1 + R), SafeDPO's with Δ = C.
    As for SafeDPO, the safe response of a pair is put first. The formula comes from a reimplementation, and was not
    compared with the authors' code.

    Args:
        beta: scale of the log-ratios, β > 0.
        margin: required lead of a safe response over an unsafe one, C ≥ 0, in units of reward.
        lam: exponent of the `basu` generator, λ > 0.
        generator: generator function, `basu` or `logistic`.
        sft_weight: weight of the chosen response's mean NLL, added to the loss (RPO, arXiv:2404.19733).

    Raises:
        InputError: an argument is out of its range.
    """

    two_log_ratios = True
    needs_safety = True

    def __init__(
        self,
        beta: float = 0.1,
        margin: float = 30.0,
        lam: float = 0.2,
        generator: Generator = "basu",
        sft_weight: float = 0.0,
    ) -> None:
        require_positive("beta", beta)
        require_not_negative("sft_weight", sft_weight)
        require_not_negative("margin", margin)
        require_positive("lam", lam)
        if generator not in get_args(Generator):
            raise InputError(f"loss: unknown generator {generator!r}; choose one of {', '.join(get_args(Generator))}")
        self.margin = margin
        self.lam = lam
        self.generator: Generator = generator
        self.beta = beta
        self.sft_weight = sft_weight
        self.initial_value = None

    def __call__(self, policy_chosen: Tensor, policy_rejected: Tensor, scores: PairScores) -> Tensor:
        """Compute the loss of each pair, (B,) float32."""
        chosen, rejected = scores.log_ratios(policy_chosen, policy_rejected)
        if scores.chosen_safe is None or scores.rejected_safe is None:
            raise ValueError("BSO needs to know which responses are safe, and these pairs do not say")
        harm = scores.chosen_safe.float() - scores.rejected_safe.float()
        log_ratio = -(self.beta * (chosen - rejected) - self.margin * harm)
        if self.generator == "logistic":
            return self.with_sft(F.softplus(log_ratio), policy_chosen, scores)
        lam, bound = self.lam, min(_LARGEST_LOG_RATIO, _LARGEST_EXPONENT / (1 + self.lam))
        within = log_ratio.clamp(-bound, bound)
        grown, shrunk = torch.exp((1 + lam) * within), torch.exp(-lam * within)
        value = (lam * grown - (1 + lam) * shrunk + 1.0) / (4.0 * lam * (1 + lam))
        # A constant beyond the bound would leave the pairs that are furthest from right without a gradient.
        slope = (grown + shrunk).detach() / 4.0
        return self.with_sft(value + slope * (log_ratio - within), policy_chosen, scores)
