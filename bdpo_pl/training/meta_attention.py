"""Attention on the meta device, which keeps for the backward pass what the fused kernels of devices keep."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor


@contextmanager
def attention_as_on_devices(keeps_mask: bool) -> Iterator[None]:
    """On the meta device PyTorch falls back on attention that keeps its T × T weights; where one trains it does not."""

    def attention(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any
    ) -> Tensor:
        return _Attention.apply(query, key, value, attn_mask if keeps_mask else None)

    with mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", attention):
        yield


class _Attention(torch.autograd.Function):
    """Keeps what the fused kernels keep: their inputs, the output, a number a row, and the mask as one of `query`."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        output = torch.empty_like(query)
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, sums, None if mask is None else mask.to(query.dtype))
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError("a plan has no backward pass")
