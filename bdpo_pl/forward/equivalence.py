"""Whether two computations of the same log-probabilities agree: up to rounding, and no further."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Log-probabilities of a response by two orders of the same arithmetic, relative to their size.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
_HALF_TOLERANCE = 3e-2


def compute_dtype(model: Any) -> torch.dtype:
    """The dtype of `model`'s products: its own, or autocast's."""
    device = next(model.parameters()).device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype


def tolerance(dtype: torch.dtype) -> float:
    """The largest `relative_error` that rounding in `dtype` explains."""
    return _TOLERANCE.get(dtype, _HALF_TOLERANCE)


def relative_error(values: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the larger of 1 and the expected size; NaN if anything is."""
    return ((values - expected).abs() / expected.abs().clamp_min(1.0)).max().item()
