"""Balanced DPO, and DPO as its special case."""

from __future__ import annotations

import math
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from bdpo_pl.comprehension import (
    ESTIMATORS,
    POSITIVE_ESTIMATORS,
    WEIGHTINGS,
    Estimator,
    Weighting,
    balance_weights,
    scaling_factor,
)
from bdpo_pl.errors import InputError
from bdpo_pl.losses.base import PairLogProbs, PairWeights, PreferenceLoss, require_positive


class BalancedDPOLoss(PreferenceLoss):
    """Balanced DPO (B-DPO), arXiv:2603.22829.

    z = β·s·( w_w·log[π_θ(y_w|x)/π_ref(y_w|x)] − w_l·log[π_θ(y_l|x)/π_ref(y_l|x)] ),  L = −log σ(z).

    The balance weights w and the scaling factor s are the paper's ideas; the formulas for them are this project's
    (`bdpo_pl.comprehension`). Both are constants in the gradient:
    ∂L/∂log π_θ(y_w|x) = −β·s·w_w·σ(−z) and ∂L/∂log π_θ(y_l|x) = +β·s·w_l·σ(−z).

    The paper's ablation: `balance=False, scale=1` is DPO to the last bit; `scale=1` is DPO+BW; `balance=False, scale=2`
    is DPO+SF.

    Args:
        beta: β > 0.
        balance: apply balance weights; without, w = (1, 1).
        tau: temperature τ > 0 of the `softmax` weighting, in the estimator's unit (nats per token for `pmi`).
            The default is for `pmi`: the standard deviation of c_w − c_l in `docs/study.md`, where 0.25 let fewer
            attacks pass than 1. `pmi_sum` needs some 20 times as much, being summed over tokens.
        weighting: `softmax`, or `ratio` for the positive estimators `ifd` and `hsic`.
        estimator: `pmi`, `pmi_sum`, `ifd` or `hsic`; see `bdpo_pl.comprehension.comprehension`.
        scale: scaling factor s: a number > 0, or `norm` for s = √(2/(w_w² + w_l²)). Default: 2 with balance, 1 without.
        label_smoothing: ε in [0, 0.5): the assumed share of flipped labels (conservative DPO),
            L = −(1−ε)·log σ(z) − ε·log σ(−z).

    Raises:
        InputError: an argument is out of its range, or `ratio` meets an estimator that can be negative.
    """

    initial_value = math.log(2.0)

    def __init__(
        self,
        beta: float = 0.1,
        balance: bool = True,
        tau: float = 0.25,
        weighting: Weighting = "softmax",
        estimator: Estimator = "pmi",
        scale: float | Literal["norm"] | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        if scale is None:
            scale = 2.0 if balance else 1.0
        require_positive("beta", beta)
        require_positive("tau", tau)
        if scale != "norm":
            require_positive("scale", scale)
        if not 0.0 <= label_smoothing < 0.5:
            raise InputError(f"loss: label_smoothing must be in [0, 0.5), got {label_smoothing}")
        if estimator not in ESTIMATORS:
            raise InputError(f"loss: unknown estimator {estimator!r}; choose one of {', '.join(ESTIMATORS)}")
        if weighting not in WEIGHTINGS:
            raise InputError(f"loss: unknown weighting {weighting!r}; choose one of {', '.join(WEIGHTINGS)}")
        if balance and weighting == "ratio" and estimator not in POSITIVE_ESTIMATORS:
            raise InputError(
                f"loss: weighting 'ratio' needs an estimator that is never negative, and {estimator!r} can be; "
                "use estimator 'ifd' or 'hsic', or weighting 'softmax'"
            )
        self.beta = beta
        self.balance = balance
        self.tau = tau
        self.weighting = weighting
        self.estimator = estimator
        self.scale = scale
        self.label_smoothing = label_smoothing
        self.needs_comprehension = balance

    def __call__(self, pairs: PairLogProbs) -> Tensor:
        """Loss of each pair, (B,) float32."""
        chosen, rejected = pairs.log_ratios()
        weights = self.weights(pairs)
        z = self.beta * weights.scale * (weights.chosen * chosen - weights.rejected * rejected)
        if self.label_smoothing == 0.0:
            return -F.logsigmoid(z)
        return -(1.0 - self.label_smoothing) * F.logsigmoid(z) - self.label_smoothing * F.logsigmoid(-z)

    def weights(self, pairs: PairLogProbs) -> PairWeights:
        """Balance weights and scaling factor of each pair."""
        if self.balance:
            if pairs.comprehension_chosen is None or pairs.comprehension_rejected is None:
                raise ValueError("balance weights need comprehension, and these pairs carry none")
            chosen, rejected = balance_weights(
                pairs.comprehension_chosen, pairs.comprehension_rejected, self.tau, self.weighting
            )
        else:
            chosen = rejected = pairs.policy_chosen.detach().float().new_ones(pairs.policy_chosen.shape)
        return PairWeights(chosen, rejected, scaling_factor(chosen, rejected, self.scale))


class DPOLoss(BalancedDPOLoss):
    """DPO, arXiv:2305.18290: L = −log σ(β·[log-ratio of the chosen − log-ratio of the rejected]).

    Balanced DPO with the balance off and no scaling, bit for bit.

    Args:
        beta: β > 0.
        label_smoothing: ε in [0, 0.5), conservative DPO.
    """

    def __init__(self, beta: float = 0.1, label_smoothing: float = 0.0) -> None:
        super().__init__(beta=beta, balance=False, scale=1.0, label_smoothing=label_smoothing)
