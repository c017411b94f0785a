"""How well a model comprehends a response to its prompt.

The paper (arXiv:2603.22829) measures comprehension as the mutual information between prompt and response under the
reference model, and optimises the better comprehended response of a pair less strongly. Its exact formulas could not be
read, so the estimators below are this project's reconstruction, each a named option. The balance weights, which are
computed from them, are in `bdpo_pl.losses.balanced_dpo`.

Shapes: B pairs or responses; R response tokens; P prompt tokens; D hidden size.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Estimator = Literal["pmi", "pmi_sum", "ifd", "hsic"]

ESTIMATORS: tuple[str, ...] = get_args(Estimator)
POSITIVE_ESTIMATORS = frozenset({"ifd", "hsic"})
"""Estimators that are never negative, which the `ratio` weighting requires."""

_EPSILON = 1e-6


def comprehension(
    estimator: Estimator,
    conditional_logp: Tensor,
    null_logp: Tensor,
    length: Tensor,
    hsic: Tensor | None = None,
) -> Tensor:
    """Compute the comprehension of each response, larger for a better comprehended one.

    - `pmi` (default): (1/|y|) Σ_t [log π(y_t | x, y_<t) − log π(y_t | x₀, y_<t)], nats per token. Pointwise mutual
      information normalised by length, as in RMiPO (arXiv:2604.24804); may be negative.
    - `pmi_sum`: the same without the division, in nats.
    - `ifd`: mean NLL given x₀ over mean NLL given x, the inverse of the score of arXiv:2308.12032; positive, no unit.
    - `hsic`: `normalised_hsic` of prompt and response hidden states, in [0, 1]; passed in, since it needs these states.

    Args:
        estimator: one of the four names above.
        conditional_logp: (B,) log π(y | x), summed over the response's tokens.
        null_logp: (B,) log π(y | x₀), x₀ the null prompt.
        length: (B,) numbers of tokens in the responses, at least 1.
        hsic: (B,) values of `normalised_hsic`; required only by the estimator `hsic`.

    Returns:
        (B,) float32.

    Raises:
        ValueError: the estimator is unknown, or it is `hsic` and its values are missing.
    """
    conditional_logp, null_logp, length = conditional_logp.float(), null_logp.float(), length.float()
    if estimator == "pmi":
        return (conditional_logp - null_logp) / length
    if estimator == "pmi_sum":
        return conditional_logp - null_logp
    if estimator == "ifd":
        # Clamped, because a response of which the model is certain has an NLL of zero.
        return (-null_logp / length).clamp_min(_EPSILON) / (-conditional_logp / length).clamp_min(_EPSILON)
    if estimator == "hsic":
        if hsic is None:
            raise ValueError("estimator 'hsic' needs hidden states: score the pairs with estimator='hsic'")
        return hsic.float()
    raise ValueError(f"unknown estimator {estimator!r}: choose one of {', '.join(ESTIMATORS)}")


def normalised_hsic(prompt_hidden: Tensor, response_hidden: Tensor) -> Tensor:
    """Compute the normalised Hilbert-Schmidt independence criterion between a prompt's and a response's hidden states.

    The D hidden coordinates are the paired samples and the tokens are the features, so prompt and response may differ
    in length. With linear kernels: ‖X Yᵀ‖²_F / (‖X Xᵀ‖_F · ‖Y Yᵀ‖_F), X and Y centred over D. Only (P, R), (P, P) and
    (R, R) matrices are formed. The choice of samples and kernel is this project's.

    Args:
        prompt_hidden: (P, D) hidden states of the prompt.
        response_hidden: (R, D) hidden states of the response.

    Returns:
        float32 scalar in [0, 1]; 0 if one side is constant.
    """
    x = prompt_hidden.float()
    y = response_hidden.float()
    x = x - x.mean(dim=1, keepdim=True)
    y = y - y.mean(dim=1, keepdim=True)
    cross = (x @ y.T).square().sum()
    norm = torch.linalg.matrix_norm(x @ x.T) * torch.linalg.matrix_norm(y @ y.T)
    return (cross / norm.clamp_min(torch.finfo(torch.float32).tiny)).clamp(0.0, 1.0)
