"""Comparison of two computations of the same quantity: they must agree up to rounding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from bdpo_pl.models.causal_lm import CausalLM
from bdpo_pl.models.precision import device_of

# Rounding of a log-probability of one token, in units of its dtype's precision: the errors of the products of many
# layers, for logits of about ten nats. Half precision rounds every activation, so its errors vary less. Between two
# layouts, SmolLM2-135M's reached 21 units in float32 and 2 in bfloat16, over some 50 responses of HH-RLHF each; a trial
# that refused one of them would choose another layout in one run than in the next.
_UNITS, _HALF_UNITS = 48.0, 4.0
_LEAST_NATS = 8.0
# The same of a single logit, which no other token's average makes smaller.
_LOGIT_UNITS, _HALF_LOGIT_UNITS = 64.0, 8.0
# Bound of the norm of a difference of gradients, relative to their norm; in half precision they differ by a few per
# cent.
_GRADIENT_BOUND = {torch.float64: 1e-7, torch.float32: 1e-3}
_HALF_GRADIENT_BOUND = 0.1
# With TF32, products of float32 have 10 bits of precision.
_TF32_EPS, _TF32_GRADIENT_BOUND = 2.0**-10, 3e-2
# The error of a part with less than this share of the largest part's gradient is measured relative to that share.
_SMALL_SHARE = 0.05


def compute_dtype(model: CausalLM) -> torch.dtype:
    """Return the dtype of `model`'s products: its own, or autocast's."""
    device = device_of(model).type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype


def rounding_of_logps(logps: Tensor, lengths: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the (S,) nats by which rounding alone may change the log-probabilities of responses.

    The errors of n tokens add up like independent draws, so the bound grows with √n.

    Args:
        logps: (S,) log-probabilities, summed over the tokens of each response.
        lengths: (S,) numbers n of tokens in the responses.
        dtype: dtype of the products.
    """
    eps, units = torch.finfo(dtype).eps, _UNITS
    if dtype not in _GRADIENT_BOUND:
        units = _HALF_UNITS
    elif dtype == torch.float32 and _tf32():
        eps, units = _TF32_EPS, _HALF_UNITS
    per_token = (logps.abs() / lengths).clamp_min(_LEAST_NATS)
    return units * eps * lengths.sqrt() * per_token


def rounding_of_logits(largest: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the largest error of a logit that rounding explains, where the largest logits are `largest`."""
    eps, units = torch.finfo(dtype).eps, _LOGIT_UNITS
    if not is_precise(dtype):
        eps, units = max(eps, _TF32_EPS) if dtype == torch.float32 else eps, _HALF_LOGIT_UNITS
    return units * eps * largest.abs().clamp_min(_LEAST_NATS)


def is_precise(dtype: torch.dtype) -> bool:
    """Return true if products in `dtype` are computed in float32 or more, and not in TF32."""
    return dtype in _GRADIENT_BOUND and not (dtype == torch.float32 and _tf32())


def rounding_of_gradients(dtype: torch.dtype) -> float:
    """Return the largest `gradient_error` that rounding in `dtype` explains."""
    if dtype == torch.float32 and _tf32():
        return _TF32_GRADIENT_BOUND
    return _GRADIENT_BOUND.get(dtype, _HALF_GRADIENT_BOUND)


def gradient_error(parts: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest norm of a difference of two parts, relative to the expected part's norm.

    Return NaN if any value is NaN.

    Args:
        parts: gradients, split into parts, because the error in a small part would not show in the norm of the whole.
        expected: expected values of the same parts.
    """
    assert len(parts) == len(expected)
    sizes = torch.stack([part.float().norm() for part in expected])
    sizes = sizes.clamp_min(max(_SMALL_SHARE * sizes.max().item(), torch.finfo(torch.float32).tiny))
    differences = torch.stack(
        [(part.float() - other.float()).norm() for part, other in zip(parts, expected, strict=True)]
    )
    return (differences / sizes).max().item()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Hold `model` in evaluation mode while the context is open, then restore the mode of each of its modules."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _tf32() -> bool:
    return torch.cuda.is_available() and torch.get_float32_matmul_precision() != "highest"
