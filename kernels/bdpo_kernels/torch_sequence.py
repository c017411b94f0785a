"""The PyTorch backend of `sequence_logprob`: the same contract, a chunk of rows at a time.

Rows of half precision are widened chunk by chunk, so there is never a float32 copy of the logits; ignored rows are not
read. Shapes: logits (B, T, V), everything about tokens (B, T).

A row's log-sum-exp is kept in its two parts, the largest logit m and log Σ exp(x − m): their sum would round away the
second one's digits where logits are large.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_CHUNK_ELEMENTS = 1 << 20
"""Logits widened at a time: 4 MiB in float32, which stays in a core's cache."""


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums are kept in: float32, but float64 for float64 input."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def token_logprobs(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """(log p(label) (B, T), normalizer (2, B, T): m and log Σ exp(x − m)) of each token; 0 for ignored tokens."""
    logp = torch.zeros(labels.shape, dtype=accumulator(logits.dtype), device=logits.device)
    normalizer = torch.zeros((2, *labels.shape), dtype=logp.dtype, device=logits.device)
    for b, rows in _chunks(labels, ignore_index, logits.shape[-1]):
        x = logits[b, rows].to(logp.dtype)
        largest = x.amax(dim=-1, keepdim=True)
        # A row of −inf alone has no distribution; shifting by 0 makes it NaN at its label and nowhere else.
        x = x - largest.masked_fill(largest == -torch.inf, 0.0)
        at_label = x.gather(1, labels[b, rows].unsqueeze(1)).squeeze(1)
        log_total = x.exp_().sum(dim=-1).log_()
        logp[b, rows] = at_label - log_total
        normalizer[0, b, rows] = largest.squeeze(1)
        normalizer[1, b, rows] = log_total
    return logp, normalizer


def sum_by_sequence(token_logp: Tensor, sequence_ids: Tensor, num_sequences: int) -> Tensor:
    """Sums of (B, T) token log-probabilities over sequences, (S,), the same bits on every run."""
    flat = token_logp.flatten()
    if flat.device.type == "cpu":
        sums = torch.zeros(num_sequences, dtype=torch.float64)
        return sums.index_add_(0, sequence_ids, flat.double()).to(flat.dtype)
    # index_add_ on a GPU adds in whatever order atomics fall.
    order = torch.argsort(sequence_ids, stable=True)
    lengths = torch.bincount(sequence_ids, minlength=num_sequences)
    return torch.segment_reduce(flat[order], "sum", lengths=lengths, unsafe=True, initial=0.0)


def logits_gradient(
    logits: Tensor, labels: Tensor, normalizer: Tensor, token_grad: Tensor, ignore_index: int, out: Tensor
) -> None:
    """Write token_grad · (one-hot(label) − softmax(logits)) to `out` (B, T, V), which may be the logits themselves."""
    out.masked_fill_((labels == ignore_index).unsqueeze(-1), 0.0)
    for b, rows in _chunks(labels, ignore_index, logits.shape[-1]):
        grad = token_grad[b, rows].unsqueeze(1)
        p = logits[b, rows].to(normalizer.dtype) - normalizer[0, b, rows].unsqueeze(1)
        p.sub_(normalizer[1, b, rows].unsqueeze(1)).exp_().mul_(-grad)
        p.scatter_add_(1, labels[b, rows].unsqueeze(1), grad)
        out[b, rows] = p.to(out.dtype)


def _chunks(labels: Tensor, ignore_index: int, V: int) -> Iterator[tuple[int, Tensor | slice]]:
    """(batch row, its next few positions that count): slices where all count, so that nothing is gathered."""
    size = max(1, _CHUNK_ELEMENTS // V)
    for b in range(labels.shape[0]):
        counted = labels[b] != ignore_index
        if bool(counted.all()):
            T = labels.shape[1]
            yield from ((b, slice(start, min(start + size, T))) for start in range(0, T, size))
        else:
            yield from ((b, rows) for rows in counted.nonzero().squeeze(1).split(size) if len(rows))
