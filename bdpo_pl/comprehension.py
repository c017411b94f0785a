"""How well a model comprehends a response to its prompt, and the balance weights that follow from it.

The paper (arXiv:2603.22829) measures comprehension as the mutual information between prompt and response under the
reference model and gives the better comprehended response of a pair less optimisation strength. Its exact formulas
could not be read, so the estimators, the weights and the scaling factor below are this project's reconstruction, each
choice a named option.

Shapes: B pairs or responses; R response tokens; P prompt tokens; D hidden size.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Estimator = Literal["pmi", "pmi_sum", "ifd", "hsic"]
Weighting = Literal["softmax", "ratio"]

ESTIMATORS: tuple[str, ...] = get_args(Estimator)
WEIGHTINGS: tuple[str, ...] = get_args(Weighting)
POSITIVE_ESTIMATORS = frozenset({"ifd", "hsic"})
"""Estimators that are never negative, as the `ratio` weighting needs."""

_EPSILON = 1e-6


def comprehension(
    estimator: Estimator,
    conditional_logp: Tensor,
    null_logp: Tensor,
    length: Tensor,
    hsic: Tensor | None = None,
) -> Tensor:
    """Comprehension of each response, larger for a better comprehended one.

    - `pmi` (default): (1/|y|) Σ_t [log π(y_t | x, y_<t) − log π(y_t | x₀, y_<t)], nats per token. Pointwise mutual
      information normalised by length, as in RMiPO (arXiv:2604.24804); may be negative.
    - `pmi_sum`: the same without the division, nats.
    - `ifd`: mean NLL given x₀ over mean NLL given x, the inverse of the score of arXiv:2308.12032; positive, no unit.
    - `hsic`: `normalised_hsic` of prompt and response hidden states, in [0, 1]; passed in, since it needs them.

    Args:
        estimator: one of the four names above.
        conditional_logp: (B,) log π(y | x), summed over the response's tokens.
        null_logp: (B,) log π(y | x₀), x₀ the null prompt.
        length: (B,) tokens in the response, at least 1.
        hsic: (B,) values of `normalised_hsic`; required by `hsic` alone.

    Returns:
        (B,) float32.

    Raises:
        ValueError: unknown estimator, or `hsic` without its values.
    """
    conditional_logp, null_logp, length = conditional_logp.float(), null_logp.float(), length.float()
    if estimator == "pmi":
        return (conditional_logp - null_logp) / length
    if estimator == "pmi_sum":
        return conditional_logp - null_logp
    if estimator == "ifd":
        # Clamped: a response that the model is certain of has an NLL of zero.
        return (-null_logp / length).clamp_min(_EPSILON) / (-conditional_logp / length).clamp_min(_EPSILON)
    if estimator == "hsic":
        if hsic is None:
            raise ValueError("estimator 'hsic' needs hidden states: score the pairs with estimator='hsic'")
        return hsic.float()
    raise ValueError(f"unknown estimator {estimator!r}: choose one of {', '.join(ESTIMATORS)}")


def normalised_hsic(prompt_hidden: Tensor, response_hidden: Tensor) -> Tensor:
    """Normalised Hilbert-Schmidt independence criterion between a prompt's and a response's hidden states.

    The D hidden coordinates are the paired samples and the tokens are the features, so prompt and response may differ
    in length. With linear kernels: ‖X Yᵀ‖²_F / (‖X Xᵀ‖_F · ‖Y Yᵀ‖_F), X and Y centred over D. Only (P, R), (P, P) and
    (R, R) matrices are formed. The choice of samples and kernel is this project's.

    Args:
        prompt_hidden: (P, D).
        response_hidden: (R, D).

    Returns:
        float32 scalar in [0, 1]; 0 where one side is constant.
    """
    x = prompt_hidden.float()
    y = response_hidden.float()
    x = x - x.mean(dim=1, keepdim=True)
    y = y - y.mean(dim=1, keepdim=True)
    cross = (x @ y.T).square().sum()
    norm = torch.linalg.matrix_norm(x @ x.T) * torch.linalg.matrix_norm(y @ y.T)
    return (cross / norm.clamp_min(torch.finfo(torch.float32).tiny)).clamp(0.0, 1.0)


def balance_weights(
    comprehension_chosen: Tensor,
    comprehension_rejected: Tensor,
    tau: float = 0.25,
    weighting: Weighting = "softmax",
) -> tuple[Tensor, Tensor]:
    """Balance weights (w_w, w_l): a share of one for each pair, the smaller for the better comprehended response.

    - `softmax`: w_w = σ(−d), w_l = σ(d), d = (c_w − c_l)/τ.
    - `ratio`: w_w = c_l/(c_w + c_l), w_l = c_w/(c_w + c_l), inputs clamped to at least 1e-6; for positive estimators.

    Args:
        comprehension_chosen: (B,) c_w.
        comprehension_rejected: (B,) c_l.
        tau: temperature τ > 0 in the estimator's unit, about the spread of c_w − c_l; only `softmax` reads it.
        weighting: `softmax` or `ratio`.

    Returns:
        Two (B,) float32 tensors that sum to 1, both ½ for a balanced pair; detached.

    Raises:
        ValueError: unknown weighting.
    """
    c_w, c_l = comprehension_chosen.detach().float(), comprehension_rejected.detach().float()
    if weighting == "softmax":
        d = (c_w - c_l) / tau
        return torch.sigmoid(-d), torch.sigmoid(d)
    if weighting == "ratio":
        c_w, c_l = c_w.clamp_min(_EPSILON), c_l.clamp_min(_EPSILON)
        return c_l / (c_w + c_l), c_w / (c_w + c_l)
    raise ValueError(f"unknown weighting {weighting!r}: choose one of {', '.join(WEIGHTINGS)}")


def scaling_factor(weight_chosen: Tensor, weight_rejected: Tensor, scale: float | Literal["norm"]) -> Tensor:
    """Scaling factor s that keeps the gradient's magnitude under the balance weights.

    A number is used as it is (2 makes a balanced pair exactly DPO). `norm` is s = √(2/(w_w² + w_l²)), for which
    ‖s·(w_w, w_l)‖ = √2, DPO's own value, for every pair.

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
