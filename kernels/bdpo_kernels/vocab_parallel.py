"""The LM head split over ranks by its vocabulary: each holds some rows of the weight, and none sees the others' logits.

A token's log-probability needs of every rank its largest logit, its sum of exponentials and, from the one that has it,
the label's logit: three numbers a token, joined by two small all-reduces. Neither logits nor weight are ever gathered.

Shapes: N packed tokens; n tokens of one chunk; D hidden size; V vocabulary; v rows of it on this rank; S sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bdpo_kernels.backends import Backend, load, resolve_backend
from bdpo_kernels.checks import check_label_values, check_linear, check_sequence_values, check_sequences
from bdpo_kernels.transform import LogitTransform

# No label: the packed operations walk over rows that count.
_NONE_IGNORED = -(1 << 62)
_NOT_HERE = -1
_BLOCK_ELEMENTS = {"cpu": 1 << 19}
_GPU_BLOCK_ELEMENTS = 1 << 26


@dataclass(frozen=True)
class VocabShard:
    """Which rows of the vocabulary this rank holds.

    Attributes:
        start: index of its first row.
        vocab_size: V, rows on all ranks together.
        group: the ranks that share the vocabulary; None: all.
    """

    start: int
    vocab_size: int
    group: dist.ProcessGroup | None = None

    @property
    def largest(self) -> int:
        """Rows of the rank that has most: chunks must be of one size on every rank."""
        return -(-self.vocab_size // dist.get_world_size(self.group))


class ShardedRows:
    """Row operations on (n, v) logits, v of V columns; same contract as `triton_rows`' and `torch_rows`' in-place ones.

    Args:
        backend: of the part that a rank does alone.
        shard: this rank's columns.
    """

    def __init__(self, backend: str, shard: VocabShard) -> None:
        self.backend = backend
        self.shard = shard

    def forward_in_place(self, logits: Tensor, labels: Tensor, transform: LogitTransform) -> tuple[Tensor, Tensor]:
        """(n,) log-probabilities of the labels, the same on every rank, and what `backward_in_place` reads."""
        local = self._local(labels, logits.shape[1])
        here = local != _NOT_HERE
        if self.backend == "triton":
            logps, stats = load("triton").forward(
                logits.unsqueeze(0), local.clamp_min(0).unsqueeze(0), _NONE_IGNORED, transform
            )
            largest, log_sum = stats.unbind()
            at_label = logps + largest + log_sum
        else:
            largest, log_sum, at_label = _statistics(logits, local.clamp_min(0), transform)
        total = largest.clone()
        dist.all_reduce(total, dist.ReduceOp.MAX, self.shard.group)
        # A rank without a column, or with none above −inf, adds nothing.
        share = torch.where(largest == -torch.inf, 0.0, torch.exp(largest - total + log_sum))
        joined = torch.stack([share, torch.where(here, at_label, 0.0)])
        dist.all_reduce(joined, dist.ReduceOp.SUM, self.shard.group)
        log_sum = joined[0].log()
        return joined[1] - total - log_sum, torch.stack([total, log_sum])

    def backward_in_place(
        self, logits: Tensor, labels: Tensor, token_grads: Tensor, state: Tensor, transform: LogitTransform
    ) -> None:
        """Write the gradient of this rank's logits over them."""
        local = self._local(labels, logits.shape[1])
        if self.backend == "triton":
            padded = logits.unsqueeze(0)
            # A label below zero equals no column.
            load("triton").backward(
                padded, local.unsqueeze(0), token_grads, state, _NONE_IGNORED, transform, out=padded
            )
        else:
            _gradient(logits, local, token_grads, state, transform)

    def reduce(self, grad_hidden: Tensor) -> None:
        """Add up, in place, what every rank's columns say of the hidden states' gradient."""
        dist.all_reduce(grad_hidden, dist.ReduceOp.SUM, self.shard.group)

    def _local(self, labels: Tensor, v: int) -> Tensor:
        local = labels.long() - self.shard.start
        return torch.where((local >= 0) & (local < v), local, _NOT_HERE)


def vocab_parallel_sequence_logprob(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    sequence_ids: Tensor,
    num_sequences: int,
    shard: VocabShard,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    chunk_bytes: int | None = None,
    backend: Backend | None = None,
    check_labels: bool = True,
) -> Tensor:
    """`linear_sequence_logprob` with (v, D) of the (V, D) weight on each rank. All ranks call it with the same tokens.

    The gradient of `hidden` is whole on every rank, that of the weight is this rank's own.

    Args:
        hidden, labels, sequence_ids: of the same value on every rank of `shard.group`.
        weight: (v, D), rows `shard.start` to `shard.start + v` of the whole.
        shard: which rows those are.
        bias: (v,).
        num_sequences, softcap, logit_scale, ignore_index, chunk_bytes, backend, check_labels: as in
            `linear_sequence_logprob`; a chunk holds v columns.

    Returns:
        (S,) float32, float64 for float64 products, the same on every rank.

    Raises:
        TypeError, ValueError: as `linear_sequence_logprob`.
    """
    # Here, because linear_head knows of this module.
    from bdpo_kernels.linear_head import chunk_tokens

    dtype = check_linear(hidden, weight, bias, labels)
    check_sequences(tuple(labels.shape), sequence_ids, num_sequences, hidden.device)
    if check_labels:
        check_label_values(labels, shard.vocab_size, ignore_index)
        check_sequence_values(sequence_ids, num_sequences)
    size = chunk_tokens(chunk_bytes, shard.largest, dtype, hidden.device)
    chosen = resolve_backend(backend, hidden.device)
    options = (num_sequences, LogitTransform(softcap, logit_scale), ignore_index, size, dtype, chosen, shard)
    return _VocabParallelSequenceLogprob.apply(hidden, weight, bias, labels, sequence_ids, *options)


class _VocabParallelSequenceLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        sequence_ids: Tensor,
        num_sequences: int,
        *options: Any,
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias, labels, sequence_ids)
        ctx.options = options
        head, parts = _walk(hidden, weight, bias, labels, options, (False, False, False))
        logps = torch.zeros(len(labels), dtype=head.wide, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for tokens in parts:
                logps.index_copy_(0, tokens, head.logps(tokens).flatten())
        return load(options[4]).sum_by_sequence(logps, sequence_ids, num_sequences)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, sequence_ids = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        head, parts = _walk(hidden, weight, bias, labels, ctx.options, needs)
        token_grads = grad.index_select(0, sequence_ids)
        with torch.autocast(hidden.device.type, enabled=False):
            for tokens in parts:
                head.logps(tokens)
                head.backward(token_grads.index_select(0, tokens))
        grads = head.gradients(weight, bias)
        return (*(g if needed else None for g, needed in zip(grads, needs, strict=True)), *[None] * 10)


def _walk(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    options: tuple[Any, ...],
    needs: tuple[bool, bool, bool],
) -> tuple[Any, list[Tensor]]:
    """The head, and the tokens that count in chunks."""
    from bdpo_kernels.linear_head import LinearHead

    transform, ignore_index, max_tokens, dtype, backend, shard = options
    kept = (labels != ignore_index).nonzero().squeeze(-1)
    head = LinearHead(
        hidden, weight, bias, labels, transform, backend, min(max_tokens, len(kept)), dtype, needs, shard
    )  # fmt: skip
    return head, [tokens for tokens in kept.split(max_tokens) if len(tokens)]


def _blocks(logits: Tensor) -> list[slice]:
    n, v = logits.shape
    size = max(1, _BLOCK_ELEMENTS.get(logits.device.type, _GPU_BLOCK_ELEMENTS) // max(1, v))
    return [slice(start, start + size) for start in range(0, n, size)]


def _transformed(rows: Tensor, transform: LogitTransform) -> Tensor:
    dtype = torch.promote_types(rows.dtype, torch.float32)
    return rows.to(dtype) if transform.is_identity else transform.apply_(rows.to(dtype, copy=True))


def _statistics(logits: Tensor, labels: Tensor, transform: LogitTransform) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row: the largest u, log Σ exp(u − largest), and u at its label."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    largest, log_sum, at_label = (torch.empty(len(labels), dtype=dtype, device=logits.device) for _ in range(3))
    for rows in _blocks(logits):
        u = _transformed(logits[rows], transform)
        top = u.amax(dim=-1, keepdim=True)
        largest[rows] = top.squeeze(-1)
        log_sum[rows] = torch.exp(u - top).sum(dim=-1).log()
        at_label[rows] = u.gather(-1, labels[rows].unsqueeze(-1)).squeeze(-1)
    return largest, log_sum, at_label


def _gradient(logits: Tensor, labels: Tensor, token_grads: Tensor, state: Tensor, transform: LogitTransform) -> None:
    """g · ∂u/∂x · (1[label] − exp(u − logsumexp)), over the logits; a label of −1 equals no column."""
    for rows in _blocks(logits):
        u = _transformed(logits[rows], transform)
        slope = torch.exp(u - state[0, rows, None] - state[1, rows, None]).neg_()
        here = (labels[rows] != _NOT_HERE).to(slope.dtype).unsqueeze(-1)
        slope.scatter_add_(-1, labels[rows].clamp_min(0).unsqueeze(-1), here)
        slope.mul_(token_grads[rows].to(slope.dtype).unsqueeze(-1))
        if not transform.is_identity:
            slope.mul_(transform.slope(u))
        logits[rows] = slope.to(logits.dtype)
