"""Row operations in plain PyTorch, a block of rows at a time. The Triton twin is `rows.triton`.

No temporary is larger than a block, whose float32 copy stays in the cache of a CPU core. Rows with an ignored label are
never read. Shapes: B, T rows of logits as two axes (packed input has B = 1); V vocabulary; S sequences.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bdpo_kernels.backends import NONE_IGNORED
from bdpo_kernels.transform import IDENTITY, LogitTransform

# Elements in a block. CPU: two cores' caches; GPU: enough to fill it, small beside the logits.
_BLOCK_ELEMENTS = {"cpu": 1 << 19}
_GPU_BLOCK_ELEMENTS = 1 << 26
_SUM_ELEMENTS = 1 << 24


def forward(
    logits: Tensor, labels: Tensor, ignore_index: int, transform: LogitTransform = IDENTITY
) -> tuple[Tensor, Tensor]:
    """Log-probability of each row's label; see `rows.triton.forward`. The second result is empty: none is needed."""
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
    out: Tensor | None = None,
) -> Tensor:
    """Gradient with respect to the raw logits; see `rows.triton.backward`. `stats` is not read."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    grads = token_grads.to(dtype).view(labels.shape)
    ignored = labels == ignore_index
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device) if out is None else out
    for rows in _kept_blocks(logits, labels, ignore_index):
        u = _transformed(logits[rows], dtype, transform)
        slope = torch.softmax(u, dim=-1).neg_()
        grad = grads[rows].unsqueeze(-1)
        slope.scatter_add_(-1, labels[rows].unsqueeze(-1).long(), torch.ones_like(grad)).mul_(grad)
        if not transform.is_identity:
            slope.mul_(transform.slope(u))
        out[rows] = slope.to(out.dtype)
    out[ignored] = 0
    return out


def forward_in_place(logits: Tensor, labels: Tensor, transform: LogitTransform) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the labels of (n, V) logits, none ignored; see `rows.triton.forward_in_place`.

    The logits become probabilities where that is all the backward needs: one exponential a logit for both passes.
    """
    if not _keeps_probabilities(logits, transform):
        return forward(logits.unsqueeze(0), labels.unsqueeze(0), NONE_IGNORED, transform)
    if transform.scale != 1.0:
        logits.mul_(transform.scale)
    index = labels.long().unsqueeze(-1)
    at_label = logits.gather(-1, index)
    largest = logits.amax(dim=-1, keepdim=True)
    # Row by row, each read before it is written.
    torch.softmax(logits, dim=-1, out=logits)
    # The largest probability is 1 / Σ exp(u − max): its logarithm completes the logsumexp without another pass.
    return (at_label - largest + logits.amax(dim=-1, keepdim=True).log()).squeeze(-1), logits.new_empty(0)


def backward_in_place(
    logits: Tensor, labels: Tensor, token_grads: Tensor, state: Tensor, transform: LogitTransform
) -> None:
    """Write the gradient over what `forward_in_place` left; see `rows.triton.backward_in_place`."""
    if not _keeps_probabilities(logits, transform):
        padded = logits.unsqueeze(0)
        backward(padded, labels.unsqueeze(0), token_grads, state, NONE_IGNORED, transform, out=padded)
        return
    grads = (token_grads * transform.scale).to(logits.dtype).unsqueeze(-1)
    logits.mul_(-grads).scatter_add_(-1, labels.long().unsqueeze(-1), grads)


def _keeps_probabilities(logits: Tensor, transform: LogitTransform) -> bool:
    # A soft-cap's slope needs the logits themselves, and half precision is too coarse for probabilities.
    return transform.softcap is None and logits.dtype in (torch.float32, torch.float64)


def shard_statistics(logits: Tensor, labels: Tensor, transform: LogitTransform) -> tuple[Tensor, Tensor, Tensor]:
    """Of each (v,) row: the largest u, log Σ exp(u − largest), and u at its label."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    largest, log_sum, at_label = (torch.empty(len(labels), dtype=dtype, device=logits.device) for _ in range(3))
    for rows in _blocks(logits):
        u = _transformed(logits[rows], dtype, transform)
        top = u.amax(dim=-1, keepdim=True)
        largest[rows] = top.squeeze(-1)
        log_sum[rows] = torch.exp(u - top).sum(dim=-1).log()
        at_label[rows] = u.gather(-1, labels[rows].unsqueeze(-1)).squeeze(-1)
    return largest, log_sum, at_label


def shard_backward(
    logits: Tensor, labels: Tensor, token_grads: Tensor, state: Tensor, transform: LogitTransform
) -> None:
    """g · ∂u/∂x · (1[label] − exp(u − logsumexp)), over the logits; a label of −1 equals no column."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    for rows in _blocks(logits):
        u = _transformed(logits[rows], dtype, transform)
        slope = torch.exp(u - state[0, rows, None] - state[1, rows, None]).neg_()
        here = (labels[rows] >= 0).to(slope.dtype).unsqueeze(-1)
        slope.scatter_add_(-1, labels[rows].clamp_min(0).unsqueeze(-1), here)
        slope.mul_(token_grads[rows].to(slope.dtype).unsqueeze(-1))
        if not transform.is_identity:
            slope.mul_(transform.slope(u))
        logits[rows] = slope.to(logits.dtype)


def sum_by_sequence(logps: Tensor, sequence_ids: Tensor, num_sequences: int) -> Tensor:
    """(S,) sums of the (N,) `logps`, by each token's index of its sequence; added up in float64, in a fixed order."""
    wide = logps.double()
    if not logps.is_cuda:
        return wide.new_zeros(num_sequences).index_add_(0, sequence_ids, wide).to(logps.dtype)
    # On a GPU index_add_ adds by atomics, in any order. A masked sum does not.
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
    """Indices of blocks of the rows that count: slices where none in the block is ignored, which copies nothing."""
    B, T, _ = logits.shape
    size = _block_rows(logits)
    kept = (labels != ignore_index).nonzero()
    if kept.shape[0] == B * T and size < T:
        yield from ((b, slice(t, t + size)) for b in range(B) for t in range(0, T, size))
    else:
        for block in kept.split(size):
            if block.shape[0]:
                yield block[:, 0], block[:, 1]
