"""What Lightning's precision means for a model: the dtype of its products under autocast."""

from __future__ import annotations

import torch


def autocast_dtype(precision: str) -> torch.dtype | None:
    """Give the dtype that linear layers are multiplied in under Lightning's `precision`; None without autocast."""
    return {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)


def half_products(precision: str) -> torch.dtype | None:
    """Give the dtype that FSDP2 sends and multiplies weights in; None: as they are held."""
    return torch.bfloat16 if precision == "bf16-mixed" else None
