"""The Triton kernels: from a row of logits to its label's log-probability, the backward pass, and both at once.

With x a raw logit, log-probabilities are those of u = scale · softcap · tanh(x / softcap). Exponentials have base 2,
which is what the hardware computes: y = log2(e) · u = FACTOR · t, where t = tanh(x / softcap), or x without a soft-cap.
FACTOR, and INNER = 2 · log2(e) / softcap (0 without one), are constants of the model, so they are compiled in; as
arguments they would be float32 even with float64 logits.

A row is read in blocks of ROWS × LANE elements. LANE is what one thread loads at once (16 bytes): each thread keeps the
maximum and the sum of its own lanes, and the threads combine theirs once, at the end of the row. Whole blocks need no
mask; the remainder of the row has one. Nothing is added by atomics, so results are bitwise identical on every run.

Offsets are 64 bits: N·V exceeds 2³¹ at 16k tokens and a vocabulary of 152k. Arguments that change from chunk to chunk
and do not affect the alignment of rows are not specialised on: each such value would compile another binary.
"""

from __future__ import annotations

# mypy: disable-error-code="no-untyped-def"
import triton
import triton.language as tl

LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def _capped(x, INNER: tl.constexpr, ACC: tl.constexpr):
    """Turn raw logits x into t: tanh(x / softcap), or x itself."""
    if INNER != 0.0:
        # tanh is computed from exp2, because the interpreter has no libdevice. It saturates to ±1 and keeps NaN.
        x = 1.0 - 2.0 / (tl.exp2(x * tl.full((), INNER, ACC)) + 1.0)
    return x


@triton.jit
def _slope(t, INNER: tl.constexpr):
    """Return softcap · dt/dx = 1 − tanh², or 1."""
    slope = 1.0
    if INNER != 0.0:
        slope = 1.0 - t * t
    return slope


@triton.jit
def _only(mask, t, FACTOR: tl.constexpr):
    """Return `t`, with masked elements set to the value that makes y = −inf.

    The mask is applied after the soft-cap, which turns −inf into a finite number.
    """
    if FACTOR > 0:
        t = tl.where(mask, t, -float("inf"))
    else:
        t = tl.where(mask, t, float("inf"))
    return t


@triton.jit
def _join(largest, total, t, factor):
    """Add a block to each lane's maximum of y and sum of 2^(y − maximum)."""
    new = tl.maximum(largest, tl.max(t * factor, axis=1))
    # While all values are −inf, −inf − (−inf) must not give NaN.
    shift = tl.where(new == -float("inf"), 0.0, new)
    # Product and shift are rounded once: at |u| ~ 1e4, rounding the product alone would lose the digits that matter.
    terms = tl.exp2(tl.fma(t, factor, -shift[:, None]))
    return new, total * tl.exp2(largest - shift) + tl.sum(terms, axis=1)


@triton.jit
def _row_statistics(
    row_ptr,
    V,
    stride_v,
    FACTOR: tl.constexpr,
    INNER: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    LANE: tl.constexpr,
):
    """Return the largest y of a row, and log2 Σ 2^(y − largest).

    They are kept separate: at |y| ~ 1e4, rounding their sum would lose the logarithm.
    """
    factor = tl.full((), FACTOR, ACC)
    largest = tl.full((ROWS,), -float("inf"), ACC)
    total = tl.zeros((ROWS,), ACC)
    at = tl.arange(0, ROWS)[:, None] * LANE + tl.arange(0, LANE)[None, :]
    whole = V // (ROWS * LANE) * (ROWS * LANE)
    for start in range(0, whole, ROWS * LANE):
        x = tl.load(row_ptr + (start + at).to(tl.int64) * stride_v).to(ACC)
        largest, total = _join(largest, total, _capped(x, INNER, ACC), factor)
    if whole < V:
        columns = whole + at
        x = tl.load(row_ptr + columns.to(tl.int64) * stride_v, mask=columns < V, other=0.0).to(ACC)
        largest, total = _join(largest, total, _only(columns < V, _capped(x, INNER, ACC), FACTOR), factor)
    top = tl.max(largest, axis=0)
    lanes = total * tl.exp2(tl.where(largest == -float("inf"), -float("inf"), largest - top))
    return top, tl.log2(tl.sum(lanes, axis=0))


@triton.jit(
    do_not_specialize=["T", "labels_stride_b"],
    do_not_specialize_on_alignment=["labels_ptr", "logps_ptr", "top_ptr", "log_sum_ptr"],
)
def token_logprob_forward(
    logits_ptr,
    labels_ptr,
    logps_ptr,
    top_ptr,
    log_sum_ptr,
    T,
    V,
    logits_stride_b,
    logits_stride_t,
    logits_stride_v,
    labels_stride_b,
    labels_stride_t,
    ignore_index,
    FACTOR: tl.constexpr,
    INNER: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    LANE: tl.constexpr,
):
    """Compute log p(label) and the two parts of the row's log2 Σ 2^y, in one read.

    One program per row (b, t), any strides.
    """
    row = tl.program_id(0).to(tl.int64)
    b = row // T
    t = row % T
    label = tl.load(labels_ptr + b * labels_stride_b + t * labels_stride_t).to(tl.int64)
    if label == ignore_index:
        # Nothing is read, so an infinite or NaN logit cannot affect the zero.
        tl.store(logps_ptr + row, 0.0)
        tl.store(top_ptr + row, 0.0)
        tl.store(log_sum_ptr + row, 0.0)
    else:
        row_ptr = logits_ptr + b * logits_stride_b + t * logits_stride_t
        top, log_sum = _row_statistics(row_ptr, V, logits_stride_v, FACTOR, INNER, ACC, ROWS, LANE)
        # If the caller disabled the check, a label out of range reads nothing and gives NaN.
        in_range = (label >= 0) & (label < V)
        x = tl.load(row_ptr + label * logits_stride_v, mask=in_range, other=float("nan")).to(ACC)
        y = tl.fma(_capped(x, INNER, ACC), tl.full((), FACTOR, ACC), -top)
        tl.store(logps_ptr + row, (y - log_sum) * tl.full((), LN2, ACC))
        tl.store(top_ptr + row, top)
        tl.store(log_sum_ptr + row, log_sum)


@triton.jit(
    do_not_specialize=["T", "labels_stride_b"],
    do_not_specialize_on_alignment=["labels_ptr", "grads_ptr", "top_ptr", "log_sum_ptr"],
)
def token_logprob_backward(
    logits_ptr,
    labels_ptr,
    top_ptr,
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
    FACTOR: tl.constexpr,
    INNER: tl.constexpr,
    SCALE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute ∂/∂x = g · scale · (1 − tanh²) · (1[label] − 2^y / Σ 2^y).

    One program per row and block, any strides.
    """
    row = tl.program_id(0).to(tl.int64)
    b = row // T
    t = row % T
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    wide_columns = columns.to(tl.int64)
    out_ptrs = out_ptr + b * out_stride_b + t * out_stride_t + wide_columns * out_stride_v
    label = tl.load(labels_ptr + b * labels_stride_b + t * labels_stride_t).to(tl.int64)
    if label == ignore_index:
        tl.store(out_ptrs, tl.zeros((BLOCK,), ACC), mask=columns < V)
    else:
        # 32-bit labels are compared with every column; a label out of range matches none.
        narrow_label = tl.where((label >= 0) & (label < V), label, -1).to(tl.int32)
        logits_ptrs = logits_ptr + b * logits_stride_b + t * logits_stride_t + wide_columns * logits_stride_v
        x = tl.load(logits_ptrs, mask=columns < V, other=-float("inf")).to(ACC)
        capped = _capped(x, INNER, ACC)
        y = tl.fma(capped, tl.full((), FACTOR, ACC), -tl.load(top_ptr + row))
        probability = tl.exp2(y - tl.load(log_sum_ptr + row))
        factor = tl.load(grads_ptr + row) * tl.full((), SCALE, ACC)
        slope = factor * (tl.where(columns == narrow_label, 1.0, 0.0) - probability) * _slope(capped, INNER)
        tl.store(out_ptrs, slope, mask=columns < V)


@triton.jit(do_not_specialize_on_alignment=["labels_ptr", "logps_ptr", "top_ptr", "log_sum_ptr"])
def softmax_gradient(
    logits_ptr,
    labels_ptr,
    logps_ptr,
    top_ptr,
    log_sum_ptr,
    out_ptr,
    V,
    logits_stride,
    out_stride,
    FACTOR: tl.constexpr,
    INNER: tl.constexpr,
    ACC: tl.constexpr,
    KNOWN: tl.constexpr,
    ROWS: tl.constexpr,
    LANE: tl.constexpr,
):
    """Compute log p(label), then its gradient −∂/∂x over scale, (1 − tanh²) · (2^y / Σ 2^y − 1[label]).

    One program per row. The row is read twice, the second time from the second-level cache if the rows in flight fit
    there. No gradient of a loss is needed: it is one number per row, which multiplies rows of the hidden states before
    one product and rows of the other product's result.

    `out_ptr` may be `logits_ptr`. With KNOWN, the statistics are read and no log-probability is written; a label below
    zero matches no column.
    """
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * logits_stride
    row_out = out_ptr + row * out_stride
    factor = tl.full((), FACTOR, ACC)
    label = tl.load(labels_ptr + row).to(tl.int64)
    in_range = (label >= 0) & (label < V)
    x_label = tl.load(row_ptr + label, mask=in_range, other=float("nan")).to(ACC)
    t_label = _capped(x_label, INNER, ACC)
    if KNOWN:
        top = tl.load(top_ptr + row)
        log_sum = tl.load(log_sum_ptr + row)
    else:
        top, log_sum = _row_statistics(row_ptr, V, 1, FACTOR, INNER, ACC, ROWS, LANE)
        tl.store(logps_ptr + row, (tl.fma(t_label, factor, -top) - log_sum) * tl.full((), LN2, ACC))
    at = tl.arange(0, ROWS)[:, None] * LANE + tl.arange(0, LANE)[None, :]
    # All threads must have read the row and its label before any writes.
    tl.debug_barrier()
    whole = V // (ROWS * LANE) * (ROWS * LANE)
    for start in range(0, whole, ROWS * LANE):
        x = tl.load(row_ptr + start + at).to(ACC)
        t = _capped(x, INNER, ACC)
        gradient = tl.exp2(tl.fma(t, factor, -top) - log_sum) * _slope(t, INNER)
        tl.store(row_out + start + at, gradient.to(out_ptr.dtype.element_ty))
    if whole < V:
        columns = whole + at
        x = tl.load(row_ptr + columns, mask=columns < V, other=0.0).to(ACC)
        t = _capped(x, INNER, ACC)
        gradient = tl.exp2(tl.fma(t, factor, -top) - log_sum) * _slope(t, INNER)
        tl.store(row_out + columns, gradient.to(out_ptr.dtype.element_ty), mask=columns < V)
    # The label's element is written last, which avoids a comparison for every logit.
    tl.debug_barrier()
    probability = tl.exp2(tl.fma(t_label, factor, -top) - log_sum)
    at_label = (probability - 1.0) * _slope(t_label, INNER)
    tl.store(row_out + label, at_label.to(out_ptr.dtype.element_ty), mask=in_range)


@triton.jit(do_not_specialize_on_alignment=["factor_ptr"])
def scale_unless_one(tensor_ptr, factor_ptr, n, BLOCK: tl.constexpr):
    """Multiply n elements by a factor on the device; a factor of 1 costs a launch only, without synchronisation."""
    factor = tl.load(factor_ptr)
    if factor != 1.0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        tl.store(tensor_ptr + at, tl.load(tensor_ptr + at, mask=at < n) * factor, mask=at < n)


@triton.jit(do_not_specialize=["N"], do_not_specialize_on_alignment=["logps_ptr", "ids_ptr", "sums_ptr"])
def sequence_sum(
    logps_ptr,
    ids_ptr,
    sums_ptr,
    N,
    BLOCK: tl.constexpr,
):
    """Sum each sequence's tokens: one program per sequence reads all N tokens in order and adds its own.

    N·S reads of a few bytes from the cache cost less than a sort, and for any order of the tokens the result is bitwise
    identical on every run. Sums are in float64, so that long responses lose nothing to rounding.
    """
    sequence = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, N, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        ids = tl.load(ids_ptr + tokens, mask=tokens < N, other=-1)
        total += tl.load(logps_ptr + tokens, mask=ids == sequence, other=0.0).to(tl.float64)
    tl.store(sums_ptr + sequence, tl.sum(total, axis=0))
