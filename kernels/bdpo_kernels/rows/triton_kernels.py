"""The Triton kernels: one row of logits to its label's log-probability, back, and the sum over a sequence.

Rows are addressed as (b, t) with three strides, so that packed logits, padded logits and slices of them such as
`logits[:, :-1]` are all read where they lie. Offsets are 64 bits: N·V passes 2³¹ at 16k tokens and a vocabulary of
152k. With `x` a raw logit, the log-probabilities are those of u = scale · softcap · tanh(x / softcap).
"""

from __future__ import annotations

# mypy: disable-error-code="no-untyped-def"
import triton
import triton.language as tl

# Rows of the three kernels are independent and each writes its own outputs: no atomics, so the order never changes.


@triton.jit
def _transformed(x, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Raw logits to the logits of the distribution."""
    if HAS_SOFTCAP:
        # tanh from exp: libdevice's own is out of the interpreter's reach. Saturates to ±1 and keeps NaN.
        x = softcap * (1.0 - 2.0 / (tl.exp(2.0 * x / softcap) + 1.0))
    return x * scale


@triton.jit
def token_logprob_forward(
    logits_ptr,
    labels_ptr,
    logps_ptr,
    max_ptr,
    log_sum_ptr,
    T,
    V,
    logits_stride_b,
    logits_stride_t,
    logits_stride_v,
    labels_stride_b,
    labels_stride_t,
    ignore_index,
    scale,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per row: online logsumexp in one read. Writes log p(label), max(u) and log Σ exp(u − max(u)).

    The two parts of the logsumexp are kept apart because their sum would round away the log at |u| ~ 1e4.
    """
    row = tl.program_id(0).to(tl.int64)
    b = row // T
    t = row % T
    label = tl.load(labels_ptr + b * labels_stride_b + t * labels_stride_t).to(tl.int64)
    if label == ignore_index:
        tl.store(logps_ptr + row, 0.0)
        tl.store(max_ptr + row, 0.0)
        tl.store(log_sum_ptr + row, 0.0)
    else:
        row_ptr = logits_ptr + b * logits_stride_b + t * logits_stride_t
        running_max = tl.full((), -float("inf"), ACC)
        running_sum = tl.full((), 0.0, ACC)
        for start in range(0, V, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            x = tl.load(row_ptr + columns.to(tl.int64) * logits_stride_v, mask=columns < V, other=-float("inf")).to(ACC)
            u = tl.where(columns < V, _transformed(x, scale, softcap, HAS_SOFTCAP), -float("inf"))
            new_max = tl.maximum(running_max, tl.max(u, axis=0))
            # As long as all is −inf, −inf − (−inf) must not make a NaN.
            shift = tl.where(new_max == -float("inf"), 0.0, new_max)
            running_sum = running_sum * tl.exp(running_max - shift) + tl.sum(tl.exp(u - shift), axis=0)
            running_max = new_max
        # A label out of range, unchecked by the caller's wish, reads nothing and gives NaN.
        in_range = (label >= 0) & (label < V)
        x_label = tl.load(row_ptr + label * logits_stride_v, mask=in_range, other=float("nan")).to(ACC)
        log_sum = tl.log(running_sum)
        tl.store(logps_ptr + row, _transformed(x_label, scale, softcap, HAS_SOFTCAP) - running_max - log_sum)
        tl.store(max_ptr + row, running_max)
        tl.store(log_sum_ptr + row, log_sum)


@triton.jit
def token_logprob_backward(
    logits_ptr,
    labels_ptr,
    max_ptr,
    log_sum_ptr,
    grads_ptr,
    out_ptr,
    T,
    V,
    logits_stride_b,
    logits_stride_t,
    logits_stride_v,
    labels_stride_b,
    labels_stride_t,
    out_stride_b,
    out_stride_t,
    out_stride_v,
    ignore_index,
    scale,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per row and block: ∂/∂x = g · scale · (1 − tanh²(x / softcap)) · (1[label] − softmax(u)).

    `out_ptr` may be `logits_ptr`: every element is read before it is written, by the same program.
    """
    row = tl.program_id(0).to(tl.int64)
    b = row // T
    t = row % T
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    wide_columns = columns.to(tl.int64)
    out_ptrs = out_ptr + b * out_stride_b + t * out_stride_t + wide_columns * out_stride_v
    label = tl.load(labels_ptr + b * labels_stride_b + t * labels_stride_t).to(tl.int64)
    if label == ignore_index:
        # Nothing is read, so an infinite or NaN logit cannot leak into the zero.
        tl.store(out_ptrs, tl.zeros((BLOCK,), ACC), mask=columns < V)
    else:
        logits_ptrs = logits_ptr + b * logits_stride_b + t * logits_stride_t + wide_columns * logits_stride_v
        x = tl.load(logits_ptrs, mask=columns < V, other=-float("inf")).to(ACC)
        grad = tl.load(grads_ptr + row)
        u = _transformed(x, scale, softcap, HAS_SOFTCAP)
        probability = tl.exp(u - tl.load(max_ptr + row) - tl.load(log_sum_ptr + row))
        slope = grad * scale * (tl.where(wide_columns == label, 1.0, 0.0) - probability)
        if HAS_SOFTCAP:
            tanh = 1.0 - 2.0 / (tl.exp(2.0 * x / softcap) + 1.0)
            slope = slope * (1.0 - tanh * tanh)
        tl.store(out_ptrs, slope, mask=columns < V)


@triton.jit
def sequence_sum(
    logps_ptr,
    ids_ptr,
    sums_ptr,
    N,
    BLOCK: tl.constexpr,
):
    """One program per sequence: reads all N tokens in order and adds up its own.

    N·S reads of a few bytes from the cache cost less than a sort would, and any order of the tokens gives the same bits
    on every run. float64, so that long responses lose nothing to rounding on the way.
    """
    sequence = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, N, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        ids = tl.load(ids_ptr + tokens, mask=tokens < N, other=-1)
        total += tl.load(logps_ptr + tokens, mask=ids == sequence, other=0.0).to(tl.float64)
    tl.store(sums_ptr + sequence, tl.sum(total, axis=0))
