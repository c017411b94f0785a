"""The Triton backend of `sequence_logprob`.

One program a token: forward reads its V logits once, keeping a running maximum and sum (online log-sum-exp) in float32;
backward reads them once and writes their gradient. Sums over a sequence are made by one program in a fixed order, with
no atomics, so every run gives the same bits. Offsets are 64-bit: N·V passes 2³¹ at 16k tokens of a 152k vocabulary.

Shapes: logits (B, T, V) of any strides, everything about tokens (B, T) contiguous. A row's log-sum-exp is kept in two
parts, as in `torch_sequence`.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bdpo_kernels.torch_sequence import accumulator

_MAX_BLOCK = 8192


@triton.jit
def _forward_kernel(
    logits, labels, logp, normalizer, num_rows, T, stride_b, stride_t, stride_v, V, ignore_index,
    ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    if label == ignore_index:
        tl.store(logp + row, 0.0)
        tl.store(normalizer + row, 0.0)
        tl.store(normalizer + num_rows + row, 0.0)
        return
    base = logits + (row // T) * stride_b + (row % T) * stride_t
    largest = tl.full((), float("-inf"), ACC)
    total = tl.zeros((), ACC)
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK).to(tl.int64)
        x = tl.load(base + cols * stride_v, mask=cols < V, other=float("-inf")).to(ACC)
        new_largest = tl.maximum(largest, tl.max(x, axis=0))
        # While all logits so far are −inf, −inf − (−inf) would be NaN.
        shift = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        total = total * tl.exp(largest - shift) + tl.sum(tl.exp(x - shift), axis=0)
        largest = new_largest
    log_total = tl.log(total)
    tl.store(logp + row, tl.load(base + label * stride_v).to(ACC) - largest - log_total)
    tl.store(normalizer + row, largest)
    tl.store(normalizer + num_rows + row, log_total)


@triton.jit
def _backward_kernel(
    logits, labels, normalizer, token_grad, out, num_rows, T,
    stride_b, stride_t, stride_v, out_stride_b, out_stride_t, out_stride_v, V, ignore_index,
    ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    out_base = out + (row // T) * out_stride_b + (row % T) * out_stride_t
    if label == ignore_index:
        for start in range(0, V, BLOCK):
            cols = start + tl.arange(0, BLOCK).to(tl.int64)
            tl.store(out_base + cols * out_stride_v, tl.zeros((BLOCK,), ACC), mask=cols < V)
        return
    base = logits + (row // T) * stride_b + (row % T) * stride_t
    largest = tl.load(normalizer + row)
    log_total = tl.load(normalizer + num_rows + row)
    grad = tl.load(token_grad + row).to(ACC)
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK).to(tl.int64)
        x = tl.load(base + cols * stride_v, mask=cols < V, other=float("-inf")).to(ACC)
        gradient = grad * (tl.where(cols == label, 1.0, 0.0) - tl.exp(x - largest - log_total))
        # Each element is read and written by this program alone, so `out` may be the logits.
        tl.store(out_base + cols * out_stride_v, gradient, mask=cols < V)


@triton.jit
def _sum_kernel(token_logp, sequence_ids, sums, N, ACC: tl.constexpr, BLOCK: tl.constexpr):
    sequence = tl.program_id(0)
    total = tl.zeros((BLOCK,), ACC)
    for start in range(0, N, BLOCK):
        at = start + tl.arange(0, BLOCK)
        mine = tl.load(sequence_ids + at, mask=at < N, other=-1) == sequence
        total += tl.load(token_logp + at, mask=mine, other=0.0)
    tl.store(sums + sequence, tl.sum(total, axis=0))


def token_logprobs(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """(log p(label) (B, T), normalizer (2, B, T): m and log Σ exp(x − m)) of each token; 0 for ignored tokens."""
    V = logits.shape[-1]
    logp = torch.empty(labels.shape, dtype=accumulator(logits.dtype), device=logits.device)
    normalizer = torch.empty((2, *labels.shape), dtype=logp.dtype, device=logits.device)
    if labels.numel():
        _forward_kernel[(labels.numel(),)](
            logits, labels.contiguous(), logp, normalizer, labels.numel(), labels.shape[1],
            *logits.stride(), V, ignore_index, ACC=_triton_dtype(logp.dtype), **_launch(V),
        )  # fmt: skip
    return logp, normalizer


def sum_by_sequence(token_logp: Tensor, sequence_ids: Tensor, num_sequences: int) -> Tensor:
    """Sums of (B, T) token log-probabilities over sequences, (S,), the same bits on every run."""
    sums = torch.empty(num_sequences, dtype=token_logp.dtype, device=token_logp.device)
    _sum_kernel[(num_sequences,)](
        token_logp, sequence_ids.contiguous(), sums, token_logp.numel(),
        ACC=_triton_dtype(sums.dtype), BLOCK=1024,
    )  # fmt: skip
    return sums


def logits_gradient(
    logits: Tensor, labels: Tensor, normalizer: Tensor, token_grad: Tensor, ignore_index: int, out: Tensor
) -> None:
    """Write token_grad · (one-hot(label) − softmax(logits)) to `out` (B, T, V), which may be the logits themselves."""
    V = logits.shape[-1]
    if labels.numel():
        _backward_kernel[(labels.numel(),)](
            logits, labels.contiguous(), normalizer, token_grad.contiguous(), out, labels.numel(), labels.shape[1],
            *logits.stride(), *out.stride(), V, ignore_index,
            ACC=_triton_dtype(normalizer.dtype), **_launch(V),
        )  # fmt: skip


def _launch(V: int) -> dict[str, int]:
    block = min(_MAX_BLOCK, triton.next_power_of_2(V))
    return {"BLOCK": block, "num_warps": 8 if block >= 4096 else 4}


def _triton_dtype(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32
