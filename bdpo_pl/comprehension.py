"""How well a model comprehends a response to its prompt.

The paper (arXiv:2603.22829) measures comprehension as the mutual information between prompt and response under the
reference model and gives the better comprehended response of a pair less optimisation strength. Its exact formulas
could not be read, so the estimators below are this project's reconstruction, each a named option. What follows from
them, the balance weights, is in `bdpo_pl.losses.balanced_dpo`.

Shapes: B pairs or responses; R response tokens; P prompt tokens; D hidden size.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Estimator = Literal["pmi", "pmi_sum", "ifd", "hsic"]

ESTIMATORS: tuple[str, ...] = get_args(Estimator)
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
