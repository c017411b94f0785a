"""Row operations in plain PyTorch, a block of rows at a time. The counterpart in Triton is `rows.triton`.

No temporary is larger than a block, whose float32 copy fits into the cache of a CPU core. Rows with an ignored label
are never read. Shapes: B, T rows of logits as two axes (packed input has B = 1); V vocabulary; S sequences.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bdpo_kernels.backends import NONE_IGNORED
from bdpo_kernels.transform import IDENTITY, LogitTransform

# Elements in a block. CPU: the caches of two cores; GPU: enough to occupy it, little compared with the logits.
_BLOCK_ELEMENTS = {"cpu": 1 << 19}
_GPU_BLOCK_ELEMENTS = 1 << 26
_SUM_ELEMENTS = 1 << 24


def forward(
    logits: Tensor, labels: Tensor, ignore_index: int, transform: LogitTransform = IDENTITY
) -> tuple[Tensor, Tensor]:
    """Return the log-probability of each row's label, and an empty tensor of statistics.

    `backward` needs no statistics here. See `rows.triton.forward`.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    logps = torch.zeros(labels.shape, dtype=dtype, device=logits.device)
    for rows in _kept_blocks(logits, labels, ignore_index):
        u = _transformed(logits[rows], dtype, transform)
        logps[rows] = torch.log_softmax(u, dim=-1).gather(-1, labels[rows].unsqueeze(-1).long()).squeeze(-1)
    return logps.flatten(), logps.new_empty(2, 0)


def backward(
    logits: Tensor,
    labels: Tensor,
    token_grads: Tensor,
    stats: Tensor,
    ignore_index: int,
    transform: LogitTransform = IDENTITY,
) -> Tensor:
    """Return the gradient with respect to the raw logits; see `rows.triton.backward`. `stats` is not read."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    grads = token_grads.to(dtype).view(labels.shape)
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    for rows in _kept_blocks(logits, labels, ignore_index):
        u = _transformed(logits[rows], dtype, transform)
        slope = torch.softmax(u, dim=-1).neg_()
        grad = grads[rows].unsqueeze(-1)
        slope.scatter_add_(-1, labels[rows].unsqueeze(-1).long(), torch.ones_like(grad)).mul_(grad)
        if not transform.is_identity:
            slope.mul_(transform.slope(u))
        out[rows] = slope.to(out.dtype)
    out[labels == ignore_index] = 0
    return out


def logprobs(logits: Tensor, labels: Tensor, transform: LogitTransform) -> Tensor:
    """Return the (n,) log-probabilities of the labels of (n, V) logits, none of which is ignored."""
    return forward(logits.unsqueeze(0), labels.unsqueeze(0), NONE_IGNORED, transform)[0]


def logprobs_and_gradient(logits: Tensor, labels: Tensor, transform: LogitTransform, gradient: Tensor) -> Tensor:
    """Return the (n,) log-probabilities, and write a gradient into (n, V) `gradient`.

    The gradient is that of −log p(label) over `transform.scale`. `gradient` may be the logits themselves. One
    exponential per logit serves both results.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    index = labels.long().unsqueeze(-1)
    if transform.softcap is None and logits.dtype == gradient.dtype == dtype:
        # The logits are overwritten by the probabilities, and these by the gradient.
        if transform.scale != 1.0:
            logits.mul_(transform.scale)
        at_label, largest = logits.gather(-1, index), logits.amax(dim=-1, keepdim=True)
        torch.softmax(logits, dim=-1, out=gradient)
        # The largest probability is 1 / Σ exp(u − max): its logarithm completes the logsumexp without another pass.
        logps = at_label - largest + gradient.amax(dim=-1, keepdim=True).log()
        gradient.scatter_add_(-1, index, torch.full_like(logps, -1.0))
        return logps.squeeze(-1)
    logps = torch.empty(len(labels), dtype=dtype, device=logits.device)
    for rows in _blocks(logits):
        u = _transformed(logits[rows], dtype, transform)
        probabilities = torch.softmax(u, dim=-1)
        largest = u.amax(dim=-1, keepdim=True)
        at_label = u.gather(-1, index[rows]) - largest + probabilities.amax(dim=-1, keepdim=True).log()
        logps[rows] = at_label.squeeze(-1)
        _write_gradient(gradient[rows], probabilities, index[rows], u, transform)
    return logps


LOG_OF_BASE = 1.0
"""Natural logarithm of the base of the exponentials in the statistics, which are those of u."""


def shard_statistics(logits: Tensor, labels: Tensor, transform: LogitTransform) -> tuple[Tensor, Tensor]:
    """Return, for each of (n, v) rows, the largest u, and log Σ exp(u − largest)."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    largest, log_sum = (torch.empty(len(labels), dtype=dtype, device=logits.device) for _ in range(2))
    for rows in _blocks(logits):
        u = _transformed(logits[rows], dtype, transform)
        top = u.amax(dim=-1, keepdim=True)
        largest[rows] = top.squeeze(-1)
        log_sum[rows] = torch.exp(u - top).sum(dim=-1).log()
    return largest, log_sum


def shard_label(logits: Tensor, labels: Tensor, transform: LogitTransform, shift: Tensor) -> Tensor:
    """Return the (n,) values of u at the labels, minus `shift` (n,)."""
    x = logits.gather(-1, labels.long().unsqueeze(-1)).squeeze(-1)
    return _transformed(x, shift.dtype, transform) - shift


def shard_gradient(
    logits: Tensor, labels: Tensor, transform: LogitTransform, shift: Tensor, log_sum: Tensor, gradient: Tensor
) -> None:
    """Write the gradient of `logprobs_and_gradient` for some of the columns, given the statistics of the whole rows.

    Label −1 matches no column.
    """
    for rows in _blocks(logits):
        u = _transformed(logits[rows], shift.dtype, transform)
        probabilities = torch.exp(u - shift[rows, None] - log_sum[rows, None])
        _write_gradient(gradient[rows], probabilities, labels[rows].long().unsqueeze(-1), u, transform)


def _write_gradient(
    gradient: Tensor, probabilities: Tensor, index: Tensor, u: Tensor, transform: LogitTransform
) -> None:
    """Write (1 − tanh²) · (p − 1[label]) from (n, V) p and u and (n, 1) labels.

    A label below zero matches no column.
    """
    probabilities.scatter_add_(-1, index.clamp_min(0), -(index >= 0).to(probabilities.dtype))
    if transform.softcap is not None:
        probabilities.mul_(transform.slope(u) / transform.scale)
    gradient.copy_(probabilities)


def scale_(tensor: Tensor, factor: Tensor) -> None:
    """Multiply `tensor` by the 0-dimensional `factor`.

    On a CPU, reading the factor needs no synchronisation, so nothing is done if it is 1.
    """
    if factor.is_cuda or factor != 1.0:
        tensor.mul_(factor)


def sum_by_sequence(logps: Tensor, sequence_ids: Tensor, num_sequences: int) -> Tensor:
    """Return (S,) sums of the (N,) `logps`, grouped by `sequence_ids`; summed in float64, in a fixed order."""
    wide = logps.double()
    if not logps.is_cuda:
        return wide.new_zeros(num_sequences).index_add_(0, sequence_ids, wide).to(logps.dtype)
    # On a GPU, index_add_ adds by atomics, in arbitrary order. A masked sum has a fixed order.
    sums = wide.new_empty(num_sequences)
    step = max(1, _SUM_ELEMENTS // max(1, logps.numel()))
    for start in range(0, num_sequences, step):
        ids = torch.arange(start, min(start + step, num_sequences), device=logps.device)
        sums[start : start + step] = torch.where(sequence_ids == ids[:, None], wide, 0.0).sum(dim=1)
    return sums.to(logps.dtype)


def _transformed(rows: Tensor, dtype: torch.dtype, transform: LogitTransform) -> Tensor:
    if transform.is_identity:
        return rows.to(dtype)
    return transform.apply_(rows.to(dtype, copy=True))


def _block_rows(logits: Tensor) -> int:
    return max(1, _BLOCK_ELEMENTS.get(logits.device.type, _GPU_BLOCK_ELEMENTS) // max(1, logits.shape[-1]))


def _blocks(logits: Tensor) -> Iterator[slice]:
    size = _block_rows(logits)
    return (slice(start, start + size) for start in range(0, len(logits), size))


def _kept_blocks(logits: Tensor, labels: Tensor, ignore_index: int) -> Iterator[tuple[Tensor | int | slice, ...]]:
    """Yield indices of blocks of the rows that count.

    They are slices if no row of the block is ignored, which avoids a copy.
    """
    B, T, _ = logits.shape
    size = _block_rows(logits)
    if ignore_index == NONE_IGNORED:
        # Counting the rows that count would wait for the device.
        yield from ((b, slice(t, t + size)) for b in range(B) for t in range(0, T, size))
        return
    kept = (labels != ignore_index).nonzero()
    if kept.shape[0] == B * T and size < T:
        yield from ((b, slice(t, t + size)) for b in range(B) for t in range(0, T, size))
    else:
        for block in kept.split(size):
            if block.shape[0]:
                yield block[:, 0], block[:, 1]
