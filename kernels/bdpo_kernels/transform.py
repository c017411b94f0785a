"""The function that a model applies to its raw logits before the softmax."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LogitTransform:
    """The function u = scale · softcap · tanh(x / softcap), or u = scale · x without a soft-cap.

    Attributes:
        softcap: bound of the logits (Gemma 2: 30), or None.
        scale: factor after the soft-cap: Cohere's `logit_scale`, the inverse of Granite's `logits_scaling`, the inverse
            of a sampling temperature, or a product of these.
    """

    softcap: float | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.softcap is not None and not (math.isfinite(self.softcap) and self.softcap > 0):
            raise ValueError(f"softcap must be a finite number > 0, or None for no cap; got {self.softcap}")
        if not math.isfinite(self.scale) or self.scale == 0:
            raise ValueError(f"logit_scale must be a finite number other than 0, got {self.scale}")

    @property
    def is_identity(self) -> bool:
        """Whether u = x."""
        return self.softcap is None and self.scale == 1.0

    def apply_(self, x: Tensor) -> Tensor:
        """Turn raw logits into u, in place."""
        if self.softcap is not None:
            x.div_(self.softcap).tanh_().mul_(self.softcap)
        return x if self.scale == 1.0 else x.mul_(self.scale)

    def slope(self, u: Tensor) -> Tensor:
        """Return du/dx at `u`, a new tensor (0-dimensional if the slope is constant)."""
        if self.softcap is None:
            return torch.tensor(self.scale, dtype=u.dtype)
        tanh = u / (self.scale * self.softcap)
        return tanh.square_().neg_().add_(1.0).mul_(self.scale)


IDENTITY = LogitTransform()
