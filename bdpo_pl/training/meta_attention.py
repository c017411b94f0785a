"""Attention on the meta device that saves the same tensors for the backward pass as the fused kernels of devices."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx


@contextmanager
def attention_as_on_devices(keeps_mask: bool) -> Iterator[None]:
    """Replace SDPA while planning: on the meta device PyTorch saves the T × T weights, but fused kernels do not."""

    def attention(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: object, **__: object
    ) -> Tensor:
        return _Attention.apply(query, key, value, attn_mask if keeps_mask else None)

    with mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", attention):
        yield


class _Attention(torch.autograd.Function):
    """Saves what the fused kernels save: inputs, output, one number per row, and the mask in the dtype of `query`."""

    @staticmethod
    def forward(ctx: FunctionCtx, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        output = torch.empty_like(query)
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, sums, None if mask is None else mask.to(query.dtype))  # type: ignore[arg-type]
        return output

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> None:
        raise RuntimeError("a plan has no backward pass")
