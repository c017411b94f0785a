"""Balanced DPO in one file: balance weights, scaling factor and the loss built from them; DPO is a special case.

For a pair (x, y_w, y_l), a policy π_θ and its frozen reference π_ref, with the comprehension c of both responses
(`bdpo_pl.comprehension`), measured before training:

1. Balance weights: w_w = σ(−d), w_l = σ(d), d = (c_w − c_l)/τ (`balance_weights`); τ is a number, or the spread of
   c_w − c_l over the training pairs (`imbalance_spread`).
2. Scaling factor: s = 2, or s = √(2/(w_w² + w_l²)) (`scaling_factor`).
3. Log-ratios: D = log π_θ(y|x) − log π_ref(y|x) of each response (`PairScores.log_ratios`).
4. Loss: z = β·s·(w_w·D_w − w_l·D_l), L = −log σ(z) (`BalancedDPOLoss`).

Steps 1 and 2 do not depend on the policy: they are computed once the pairs are scored. The ideas are the paper's
(arXiv:2603.22829); the formulas of 1 and 2 are this project's reconstruction.

Shapes: B pairs.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bdpo_pl.comprehension import ESTIMATORS, POSITIVE_ESTIMATORS, Estimator
from bdpo_pl.errors import InputError
from bdpo_pl.losses.base import PairScores, PairWeights, PreferenceLoss, require_not_negative, require_positive

Weighting = Literal["softmax", "ratio"]

WEIGHTINGS: tuple[str, ...] = get_args(Weighting)

EXTREME_RATIO = 50.0
"""Ratio of a pair's larger balance weight to its smaller one that is warned of if half of the pairs exceed it."""

DEFAULT_TAU = 0.25
"""τ of the estimator `pmi`, in nats per token: of the two values that a registered trial on a real model compared, the
one that its rule chose (docs/study_real_results.md). The other estimators have other units: τ is `auto`."""

_EPSILON = 1e-6
_ROUNDING = 1e-5
_SMALLEST_WEIGHT = 1e-12


def imbalance_spread(comprehension_chosen: Tensor, comprehension_rejected: Tensor) -> float:
    """Measure the spread of the imbalance Δ = c_w − c_l over pairs, which is τ if τ is `auto`.

    It is 1.4826 · MAD, the median absolute deviation from the median. For a normal distribution this equals the
    standard deviation, but outliers do not change it (Huber, Robust Statistics, 1981). Its lower bound is a tenth of
    the median of |Δ|, which matters if all pairs are imbalanced alike. If more than half of the pairs are balanced,
    both are 0, and the standard deviation is used instead; if every pair is balanced, the result is 1. A Δ that may be
    mere rounding is 0.

    Args:
        comprehension_chosen: (M,) c_w of all training pairs.
        comprehension_rejected: (M,) c_l of all training pairs.

    Returns:
        A number above 0, in the estimator's unit.
    """
    rounding = _ROUNDING * (comprehension_chosen.abs() + comprehension_rejected.abs())
    imbalance = comprehension_chosen - comprehension_rejected
    imbalance = imbalance.where(imbalance.abs() > rounding, imbalance.new_zeros(()))
    return robust_spread(imbalance.double().cpu().numpy()) or 1.0


def robust_spread(imbalance: np.ndarray) -> float:
    """Measure the spread of the (M,) `imbalance` as `imbalance_spread` does; 0 where every pair is balanced."""
    robust = 1.4826 * np.median(np.abs(imbalance - np.median(imbalance)))
    return float(max(robust, 0.1 * np.median(np.abs(imbalance))) or imbalance.std())


def weight_ratios(weights: np.ndarray) -> np.ndarray:
    """Return the (M,) ratios of the larger to the smaller of the (2, M) float64 balance `weights`."""
    return np.asarray(weights.max(axis=0) / weights.min(axis=0).clip(_SMALLEST_WEIGHT))


def balance_weights(
    comprehension_chosen: Tensor,
    comprehension_rejected: Tensor,
    tau: float,
    weighting: Weighting = "softmax",
    max_ratio: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the balance weights (w_w, w_l), which sum to 1; the better comprehended response gets the smaller one.

    - `softmax`: w_w = σ(−d), w_l = σ(d), d = (c_w − c_l)/τ.
    - `ratio`: w_w = c_l/(c_w + c_l), w_l = c_w/(c_w + c_l), inputs clamped to at least 1e-6; for positive estimators.

    Args:
        comprehension_chosen: (B,) c_w.
        comprehension_rejected: (B,) c_l.
        tau: temperature τ > 0 in the estimator's unit, about the spread of c_w − c_l; used only by `softmax`.
        weighting: `softmax` or `ratio`.
        max_ratio: upper bound on the ratio of the larger weight to the smaller one, above 1; None: no bound.

    Returns:
        Two (B,) float32 tensors that sum to 1, both ½ for a balanced pair; detached.

    Raises:
        ValueError: unknown weighting.
    """
    c_w, c_l = comprehension_chosen.detach().float(), comprehension_rejected.detach().float()
    if weighting == "softmax":
        d = (c_w - c_l) / tau
        if max_ratio is not None:
            d = d.clamp(-math.log(max_ratio), math.log(max_ratio))
        return torch.sigmoid(-d), torch.sigmoid(d)
    if weighting == "ratio":
        c_w, c_l = c_w.clamp_min(_EPSILON), c_l.clamp_min(_EPSILON)
        low, high = (0.0, 1.0) if max_ratio is None else (1 / (1 + max_ratio), max_ratio / (1 + max_ratio))
        return (c_l / (c_w + c_l)).clamp(low, high), (c_w / (c_w + c_l)).clamp(low, high)
    raise ValueError(f"unknown weighting {weighting!r}: choose one of {', '.join(WEIGHTINGS)}")


def scaling_factor(weight_chosen: Tensor, weight_rejected: Tensor, scale: float | Literal["norm"]) -> Tensor:
    """Compute the scaling factor s, which compensates for the smaller gradient under balance weights.

    A number is used for every pair (with 2, a balanced pair has exactly DPO's loss). `norm` is s = √(2/(w_w² + w_l²)),
    so that ‖s·(w_w, w_l)‖ = √2 for every pair, the value of DPO.

    Args:
        weight_chosen: (B,) w_w.
        weight_rejected: (B,) w_l.
        scale: a number or `norm`.

    Returns:
        (B,) float32.
    """
    if scale == "norm":
        return torch.sqrt(2.0 / (weight_chosen.square() + weight_rejected.square()))
    return torch.full_like(weight_chosen, float(scale))


class BalancedDPOLoss(PreferenceLoss):
    """Balanced DPO (B-DPO), arXiv:2603.22829.

    z = β·s·( w_w·log[π_θ(y_w|x)/π_ref(y_w|x)] − w_l·log[π_θ(y_l|x)/π_ref(y_l|x)] ),  L = −log σ(z).

    The balance weights w and the scaling factor s are constants in the gradient:
    ∂L/∂log π_θ(y_w|x) = −β·s·w_w·σ(−z) and ∂L/∂log π_θ(y_l|x) = +β·s·w_l·σ(−z).

    The paper's ablation: `balance=False, scale=1` is DPO to the last bit; `scale=1` is DPO+BW; `balance=False, scale=2`
    is DPO+SF.

    Args:
        beta: scale of the log-ratios, β > 0; a larger β keeps the policy closer to the reference.
        balance: apply balance weights. If false, w = (1, 1).
        tau: temperature of the `softmax` weighting in the estimator's unit (nats per token for `pmi`): a number > 0, or
            `auto`, the spread of c_w − c_l over the training pairs, measured after they are scored. Default: 0.25 for
            `pmi`, `auto` for the other estimators.
        weighting: formula of the balance weights: `softmax`, or `ratio` for the positive estimators `ifd` and `hsic`.
        estimator: estimator of comprehension: `pmi`, `pmi_sum`, `ifd` or `hsic` (`bdpo_pl.comprehension`).
        scale: scaling factor s: a number > 0, or `norm` for s = √(2/(w_w² + w_l²)). Default: 2 with balance, 1 without.
        label_smoothing: assumed share of flipped labels, ε in [0, 0.5) (conservative DPO):
            L = −(1−ε)·log σ(z) − ε·log σ(−z).
        max_weight_ratio: upper bound on the ratio of a pair's larger weight to its smaller one, above 1. Default: none.
        sft_weight: weight of the chosen response's mean NLL, added to the loss (RPO, arXiv:2404.19733).

    Raises:
        InputError: an argument is out of its range, or `ratio` is used with an estimator that can be negative.
    """

    def __init__(
        self,
        beta: float = 0.1,
        balance: bool = True,
        tau: float | Literal["auto"] | None = None,
        weighting: Weighting = "softmax",
        estimator: Estimator = "pmi",
        scale: float | Literal["norm"] | None = None,
        label_smoothing: float = 0.0,
        max_weight_ratio: float | None = None,
        sft_weight: float = 0.0,
    ) -> None:
        if scale is None:
            scale = 2.0 if balance else 1.0
        if tau is None:
            tau = DEFAULT_TAU if estimator == "pmi" else "auto"
        require_positive("beta", beta)
        if tau != "auto":
            require_positive("tau", tau)
        if max_weight_ratio is not None and not (max_weight_ratio > 1.0 and math.isfinite(max_weight_ratio)):
            raise InputError(
                f"loss: max_weight_ratio must be above 1, the ratio of equal weights; got {max_weight_ratio}"
            )
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
        self.max_weight_ratio = max_weight_ratio
        self.two_log_ratios = not balance
        require_not_negative("sft_weight", sft_weight)
        self.sft_weight = sft_weight
        # The chosen response's NLL differs from pair to pair.
        self.initial_value = math.log(2.0) if sft_weight == 0.0 else None
        self.needs_comprehension = balance
        self.needs_all_pairs = balance and weighting == "softmax" and tau == "auto"
        self._spread: float | None = None

    def papers(self) -> list[str]:
        """Return the papers to cite: those of DPO where neither balance weights nor a scaling factor change it."""
        if type(self) is BalancedDPOLoss and not self.balance and self.scale == 1.0:
            return DPOLoss(sft_weight=self.sft_weight).papers()
        return super().papers()

    def __call__(self, policy_chosen: Tensor, policy_rejected: Tensor, scores: PairScores) -> Tensor:
        """Compute the loss of each pair, (B,) float32."""
        chosen, rejected = scores.log_ratios(policy_chosen, policy_rejected)
        weights = self.weights(scores)
        z = self.beta * weights.scale * (weights.chosen * chosen - weights.rejected * rejected)
        losses = -F.logsigmoid(z)
        if self.label_smoothing > 0.0:
            losses = (1.0 - self.label_smoothing) * losses - self.label_smoothing * F.logsigmoid(-z)
        return self.with_sft(losses, policy_chosen, scores)

    def weights(self, scores: PairScores) -> PairWeights:
        """Compute the balance weights and the scaling factor of each pair."""
        if self.balance:
            if scores.comprehension_chosen is None or scores.comprehension_rejected is None:
                raise ValueError("balance weights need comprehension, and these pairs carry none")
            chosen, rejected = balance_weights(
                scores.comprehension_chosen,
                scores.comprehension_rejected,
                self.temperature() if self.weighting == "softmax" else 1.0,
                self.weighting,
                self.max_weight_ratio,
            )
        else:
            chosen = rejected = torch.ones_like(scores.chosen_length, dtype=torch.float32)
        return PairWeights(chosen, rejected, scaling_factor(chosen, rejected, self.scale))

    def temperature(self) -> float:
        """Return τ as a number.

        Raises:
            ValueError: τ is `auto`, and `prepare` has not been called.
        """
        if self.tau != "auto":
            return self.tau
        if self._spread is None:
            raise ValueError("tau is auto: call prepare(scores of all training pairs) first, or give tau a number")
        return self._spread

    def prepare(self, scores: PairScores) -> None:
        """Measure τ if it is `auto`."""
        if self.needs_all_pairs:
            assert scores.comprehension_chosen is not None
            assert scores.comprehension_rejected is not None
            self._spread = imbalance_spread(scores.comprehension_chosen, scores.comprehension_rejected)

    def state_dict(self) -> dict[str, float]:
        """Return τ if it was measured."""
        return {"tau": self._spread} if self.needs_all_pairs and self._spread is not None else {}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore τ if it is `auto`, so that a resumed run has the same balance weights.

        Raises:
            InputError: the checkpoint was written by a run whose τ was a number.
        """
        if not self.needs_all_pairs:
            return
        if "tau" not in state:
            raise InputError(
                "model.loss.tau is auto, but the checkpoint was written with a number (0.25 is the default for "
                "pmi); to continue, give --model.loss.tau that number"
            )
        self._spread = state["tau"]


class DPOLoss(BalancedDPOLoss):
    """DPO, arXiv:2305.18290: L = −log σ(β·[log-ratio of the chosen − log-ratio of the rejected]).

    It equals Balanced DPO without balance weights and scaling, bit for bit.

    Args:
        beta: scale of the log-ratios, β > 0; a larger β keeps the policy closer to the reference.
        label_smoothing: assumed share of flipped labels, ε in [0, 0.5) (conservative DPO).
        sft_weight: weight of the chosen response's mean NLL, added to the loss (RPO, arXiv:2404.19733).
    """

    def __init__(self, beta: float = 0.1, label_smoothing: float = 0.0, sft_weight: float = 0.0) -> None:
        super().__init__(beta, balance=False, scale=1.0, label_smoothing=label_smoothing, sft_weight=sft_weight)
