"""Operations on the meta device that save the same tensors for the backward pass as the kernels of devices."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from unittest import mock

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

_autocast = torch.autocast


@contextmanager
def operations_as_on_devices(keeps_mask: bool) -> Iterator[None]:
    """Replace what the meta device computes otherwise than devices, or cannot compute, while planning.

    Attention (SDPA) saves the T × T weights there, but fused kernels do not. The products of a mixture's experts are
    known there in bfloat16 only, and autocast is not known at all.
    """

    def attention(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: object, **__: object
    ) -> Tensor:
        return _Attention.apply(query, key, value, attn_mask if keeps_mask else None)

    def experts(rows: Tensor, weight: Tensor, *, offs: Tensor, **_: object) -> Tensor:
        return _Experts.apply(rows, weight, offs)

    functional = torch.nn.functional
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(functional, "scaled_dot_product_attention", attention))
        stack.enter_context(mock.patch.object(torch, "autocast", _autocast_but_on_meta))
        for home, name in ((functional, "grouped_mm"), (torch, "_grouped_mm")):
            if hasattr(home, name):
                stack.enter_context(mock.patch.object(home, name, experts))
        yield


def _autocast_but_on_meta(device_type: str, *given: object, **options: object) -> AbstractContextManager[object]:
    return nullcontext() if device_type == "meta" else _autocast(device_type, *given, **options)  # type: ignore[arg-type]


class _Saves(torch.autograd.Function):
    """An operation without values."""

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> None:
        raise RuntimeError("a plan has no backward pass")


class _Attention(_Saves):
    """Saves what the fused kernels save: inputs, output, one number per row, and the mask in the dtype of `query`."""

    @staticmethod
    def forward(ctx: FunctionCtx, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        R, heads, T, _ = query.shape
        # As kernels return it: the heads of one position beside each other. Those of values may have another size.
        output = query.new_empty(R, T, heads, value.shape[-1]).transpose(1, 2)
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, sums, None if mask is None else mask.to(query.dtype))  # type: ignore[arg-type]
        return output


class _Experts(_Saves):
    """Saves the rows, sorted by expert, the weights of all experts, and where the rows of each end."""

    @staticmethod
    def forward(ctx: FunctionCtx, rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight, ends)
        return rows.new_empty(len(rows), weight.shape[-1])
