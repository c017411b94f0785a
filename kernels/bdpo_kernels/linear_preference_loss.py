"""A preference loss from hidden states, whose gradients are computed in the forward pass.

A pair's loss depends on that pair alone, so its gradient is known as soon as its log-probabilities are. Each chunk of
whole pairs is projected once, its logits are overwritten by their gradient, and this is multiplied back. That takes
6·N·V·D floating-point operations, for the three products that a training step cannot avoid, and one chunk of logits.

Shapes: N packed tokens; D hidden size; V vocabulary; B pairs; b pairs of one chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bdpo_kernels.backends import Backend, load, resolve_backend
from bdpo_kernels.checks import (
    check_label_values,
    check_length_values,
    check_lengths,
    check_linear,
    check_sequence_values,
    check_sequences,
    without_autocast,
)
from bdpo_kernels.chunks import ChunkSizes, chunk_sizes, pairs_evenly, pitch, split_evenly
from bdpo_kernels.linear_head import HeadOptions, LinearHead, gathered
from bdpo_kernels.rows.sharded import VocabShard
from bdpo_kernels.transform import LogitTransform

LossFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(chosen (b,), rejected (b,) log-probabilities, pair index (b,)) → losses (b,)."""


@torch.compiler.disable(reason="the loss is an arbitrary Python function, called chunk by chunk")
def linear_preference_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    sequence_ids: Tensor,
    loss_fn: LossFunction,
    *,
    num_pairs: int,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    chunk_bytes: int | None = None,
    backend: Backend | None = None,
    check_labels: bool = True,
    shard: VocabShard | None = None,
    lengths: Sequence[int] | None = None,
    exact: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum the losses of B pairs; sequence p is the chosen response of pair p, sequence B + p the rejected one.

    The loss may be multiplied by any factor, and its backward runs once. The factor is applied after the gradients are
    computed, so it cannot keep float16 gradients from vanishing, which is the purpose of a gradient scaler. A pair with
    more tokens than a chunk is projected twice, unless weight and bias are frozen. Memory besides inputs and gradients:
    one chunk of logits' gradients, a block of float32 logits, a float32 copy of the weight's gradient if that is in
    half precision and there is more than one chunk, and under autocast a copy of the weight in its dtype.

    Args:
        hidden: (N, D) hidden states that enter the LM head.
        weight: (V, D) weight, in the dtype of `hidden` (any dtypes under autocast). Without `requires_grad` (a
            frozen head) its product is omitted: 4·N·V·D. A DTensor is gathered, and its gradient is the mean over its
            ranks, which may have different pairs.
        labels: (N,) int64 or int32 labels. Rows labelled `ignore_index` are not computed; their gradient is exactly 0.
        sequence_ids: (N,) integers in [0, 2B), the index of each token's sequence, in any order.
        loss_fn: function that returns the loss of each of b pairs. It is called under autograd with float32
            log-probabilities that require a gradient, for a few pairs at a time, so it must not mix pairs.
        num_pairs: number of pairs B.
        bias: (V,) bias of the LM head; a DTensor as for `weight`.
        softcap: bound of the logits, as in `linear_sequence_logprob`.
        logit_scale: factor of the logits.
        ignore_index: label of the tokens that are left out.
        chunk_bytes: bytes of logits in memory at a time.
        backend: "triton", "torch", or None: Triton for CUDA tensors, PyTorch for others.
        check_labels: check that labels and indices are in range, which synchronises with a GPU.
        shard: rows of the vocabulary that this rank holds, if `weight` (v, D) and `bias` (v,) are its part of them; see
            `rows.sharded`. All ranks call with the same tokens, and get the same loss.
        lengths: number of counting tokens of each of the 2B sequences, as Python ints. With them, and without
            `check_labels`, there is no synchronisation with a GPU. They are checked if `check_labels` is on, or the
            tensors are on a CPU.
        exact: keep the logits in float32, as in `linear_sequence_logprob`.

    Returns:
        Scalar loss, (B,) log-probabilities of the chosen and (B,) of the rejected responses, without gradient; float32,
        or float64 for float64 products.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape or device, a label or index is out of range, or
            `loss_fn` does not return one loss per pair.
        RuntimeError: backward is called twice, or a second derivative is requested.
    """
    if shard is None:
        weight, bias = gathered(weight), None if bias is None else gathered(bias)
    else:
        shard.check_rows()
    V, widest = (weight.shape[0],) * 2 if shard is None else (shard.vocab_size, shard.largest)
    dtype = check_linear(hidden, weight, bias, labels)
    transform = LogitTransform(softcap, logit_scale)
    if not isinstance(num_pairs, int) or isinstance(num_pairs, bool) or num_pairs < 1:
        raise ValueError(f"num_pairs must be an int ≥ 1, got {num_pairs!r}")
    check_sequences(tuple(labels.shape), sequence_ids, 2 * num_pairs, hidden.device)
    if check_labels:
        check_label_values(labels, V, ignore_index)
        check_sequence_values(sequence_ids, 2 * num_pairs)
    if lengths is not None:
        check_lengths(lengths, 2 * num_pairs, labels)
        if check_labels or labels.device.type == "cpu":
            check_length_values(lengths, labels, sequence_ids, ignore_index)
    chosen = resolve_backend(backend, hidden.device)
    options = HeadOptions(transform, ignore_index, dtype, exact, chosen, shard)
    needs = tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in (hidden, weight, bias))
    gradient_dtype = options.gradient_dtype(hidden.device)
    sizes = chunk_sizes(
        chunk_bytes, widest, hidden.shape[1], dtype, options.logits_dtype, gradient_dtype, hidden.device, weight.dtype,
        width=pitch(widest, padded=chosen == "triton"),
    )  # fmt: skip
    return _LinearPreferenceLoss.apply(
        hidden, weight, bias, labels, sequence_ids, loss_fn, num_pairs, lengths, options, sizes, needs
    )


class _Chunk(NamedTuple):
    """Consecutive pairs [first, last) and their tokens, those of a pair in their original order."""

    first: int
    last: int
    tokens: Tensor
    parts: tuple[Tensor, ...]
    """The same tokens, in more than one part if they are too many: a long pair alone, or the head is frozen."""


class _LinearPreferenceLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        sequence_ids: Tensor,
        loss_fn: LossFunction,
        num_pairs: int,
        lengths: Sequence[int] | None,
        options: HeadOptions,
        sizes: ChunkSizes,
        needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor, Tensor, Tensor]:
        with without_autocast(hidden.device):
            frozen = not (needs[1] or needs[2])
            order, counts = _tokens_by_pair(labels, sequence_ids, num_pairs, lengths, options.ignore_index)
            division = sizes.of(sum(counts), needs[1])
            chunks = _chunks(order, counts, division.tokens, hidden.shape[1] if frozen else None)
            largest = max(len(part) for chunk in chunks for part in chunk.parts)
            parts = sum(len(chunk.parts) for chunk in chunks)
            head = LinearHead(hidden, weight, bias, labels, options, sizes, division, largest, needs, parts)
            total = torch.zeros((), dtype=options.wide, device=hidden.device)
            logps = torch.zeros(2, num_pairs, dtype=options.wide, device=hidden.device)
            for chunk in chunks:
                loss, logps[:, chunk.first : chunk.last] = _walk(
                    head, chunk, sequence_ids, loss_fn, num_pairs, any(needs)
                )
                total += loss
        ctx.gradients, ctx.backend = head.gradients(weight, bias), options.backend
        ctx.needs = needs
        chosen, rejected = logps.unbind()
        ctx.mark_non_differentiable(chosen, rejected)
        return total, chosen, rejected

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("linear_preference_loss has no second derivative: call backward without create_graph")
        if ctx.gradients is None:
            raise RuntimeError(
                "linear_preference_loss: the gradients were released by the first backward, so there is no second; "
                "compute the loss again"
            )
        gradients, ctx.gradients = ctx.gradients, None
        # The gradient of a weight is too large to hold twice, so it is scaled in place.
        for gradient, needed in zip(gradients, ctx.needs, strict=True):
            if needed:
                load(ctx.backend).scale_(gradient, grad)
        wanted = (gradient if needed else None for gradient, needed in zip(gradients, ctx.needs, strict=True))
        return (*wanted, *[None] * 8)


def _tokens_by_pair(
    labels: Tensor, sequence_ids: Tensor, num_pairs: int, lengths: Sequence[int] | None, ignore_index: int
) -> tuple[Tensor, list[int]]:
    """Return the indices of all tokens, grouped by pair, ignored ones last, and the number that count in each pair."""
    # Ignored tokens come last, as if they belonged to one more pair.
    pairs = torch.where(labels == ignore_index, num_pairs, sequence_ids.long() % num_pairs)
    order = torch.argsort(pairs, stable=True)
    if lengths is not None:
        return order, [lengths[pair] + lengths[num_pairs + pair] for pair in range(num_pairs)]
    # This is the only synchronisation with the GPU.
    counts = pairs.new_zeros(num_pairs + 1).index_add_(0, pairs, torch.ones_like(pairs)).tolist()
    return order, counts[:num_pairs]


def _chunks(order: Tensor, counts: list[int], most: int, columns: int | None) -> list[_Chunk]:
    """Return the tokens that count, in the fewest chunks of at most `most` tokens, of about equal size.

    Args:
        order: indices of the tokens, grouped by pair.
        counts: (B,) numbers of tokens of the pairs.
        most: maximum number of tokens in a chunk.
        columns: hidden size if weight and bias are frozen, else None. If they are, all pairs make one chunk in parts,
            whose sizes do not depend on the pairs.
    """
    chunks, start = [], 0
    for first, last in pairs_evenly(counts, most) if columns is None else [(0, len(counts))]:
        end = start + sum(counts[first:last])
        tokens = order[start:end]
        chunks.append(_Chunk(first, last, tokens, split_evenly(tokens, most, columns or 0) or (tokens,)))
        start = end
    return chunks


def _walk(
    head: LinearHead,
    chunk: _Chunk,
    sequence_ids: Tensor,
    loss_fn: LossFunction,
    num_pairs: int,
    needs_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Return loss (scalar) and log-probabilities (2, b) of one chunk, and add to the gradients of `head`."""
    b = chunk.last - chunk.first
    global_ids = sequence_ids.index_select(0, chunk.tokens).long()
    rejected = global_ids >= num_pairs
    ids = global_ids - chunk.first - torch.where(rejected, num_pairs - b, 0)
    whole = len(chunk.parts) == 1
    # The loss scales rows of the hidden states' gradient, which can be done when all parts are known.
    deferred = needs_grad and not whole and head.grad_weight is None and head.grad_bias is None
    token_logps = []
    for part in chunk.parts:
        token_logps.append(head.logps(part, for_backward=needs_grad and (whole or deferred)))
        if deferred:
            head.backward_to_hidden()
    flat = token_logps[0] if whole else torch.cat(token_logps)
    sums = load(head.options.backend).sum_by_sequence(flat, ids, 2 * b).view(2, b)
    pair_index = torch.arange(chunk.first, chunk.last, device=ids.device)
    loss, grads = _loss_and_gradient(loss_fn, sums, pair_index, needs_grad)
    if needs_grad:
        token_grads = grads.flatten().index_select(0, ids).split([len(part) for part in chunk.parts])
        for part, of_part in zip(chunk.parts, token_grads, strict=True):
            if deferred:
                head.scale_hidden(part, of_part)
                continue
            if not whole:
                # The logits of a pair that is too long for a chunk were overwritten, so they are computed again.
                head.logps(part, for_backward=True)
            if len(part):
                head.backward(of_part)
    return loss, sums


def _loss_and_gradient(
    loss_fn: LossFunction, sums: Tensor, pair_index: Tensor, needs_grad: bool
) -> tuple[Tensor, Tensor]:
    with torch.set_grad_enabled(needs_grad):
        sums = sums.detach().requires_grad_(needs_grad)
        losses = loss_fn(sums[0], sums[1], pair_index)
        if losses.shape != pair_index.shape:
            raise ValueError(
                f"loss_fn must return one loss per pair, shape {tuple(pair_index.shape)}; got {losses.shape}"
            )
        loss = losses.sum()
    if not needs_grad:
        return loss, sums
    if not loss.requires_grad:
        return loss.detach(), torch.zeros_like(sums)
    (grads,) = torch.autograd.grad(loss, sums)
    return loss.detach(), grads
