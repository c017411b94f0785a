"""Log-probabilities of sequences from hidden states, including the LM head, with at most one chunk of logits in memory.

Shapes: N packed tokens; D hidden size; V vocabulary; S sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

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
from bdpo_kernels.chunks import ChunkSizes, chunk_sizes, pitch, split_evenly
from bdpo_kernels.linear_head import HeadOptions, LinearHead, gathered
from bdpo_kernels.rows.sharded import VocabShard
from bdpo_kernels.transform import LogitTransform


def linear_sequence_logprob(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    sequence_ids: Tensor,
    num_sequences: int | None = None,
    *,
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
) -> Tensor:
    """Sum log softmax(u)[label] over each sequence.

    u = logit_scale · softcap · tanh(x / softcap), x = hidden @ weightᵀ + bias; without a soft-cap, u = logit_scale · x.
    Logits are computed one chunk of tokens at a time, and again in the backward pass: 8·N·V·D floating-point operations
    in total. If the loss is known pair by pair, `linear_preference_loss` needs only 6·N·V·D. Under autocast the
    products use its dtype. Each gradient has the dtype of its tensor; that of the weight is accumulated in float32.

    Args:
        hidden: (N, D) hidden states that enter the LM head.
        weight: (V, D) weight, in the dtype of `hidden` (any dtypes under autocast). A DTensor is gathered, and
            its gradient is the mean over its ranks.
        labels: (N,) int64 or int32 labels. Rows labelled `ignore_index` are not computed; their gradient is exactly 0.
        sequence_ids: (N,) integers, the index of each token's sequence, in any order.
        num_sequences: number of sequences S. Default: the largest index + 1, which synchronises with the GPU.
        bias: (V,) bias of the LM head; a DTensor as for `weight`.
        softcap: bound of the logits (Gemma 2: 30).
        logit_scale: factor of the logits: Cohere's `logit_scale`, 1 / Granite's `logits_scaling`, 1 / temperature.
        ignore_index: label of the tokens that are left out.
        chunk_bytes: bytes of logits in memory at a time. The default depends on the device (64 MiB on a CPU, 1 GiB on a
            GPU), and is enough for at least 512 tokens.
        backend: "triton", "torch", or None: Triton for CUDA tensors, PyTorch for others.
        check_labels: check that labels and indices are in range, which synchronises with a GPU.
        shard: rows of the vocabulary that this rank holds, if `weight` (v, D) and `bias` (v,) are its part of them; see
            `rows.sharded`. All ranks call with the same tokens and get the same result; the gradient of `hidden` is
            complete on every rank, that of `weight` is this rank's own. torch.compile breaks its graph here.
        lengths: number of counting tokens of each of the S sequences, as Python ints. They avoid a synchronisation with
            the GPU.
        exact: keep the logits of half-precision products in float32. They take twice the bytes, so chunks
            have half the tokens. Rounded to bfloat16, the log-probability of 250 tokens would be wrong by 0.02 to 0.44
            nats.

    Returns:
        (S,) float32, or float64 for float64 products; 0 for a sequence without a counting label.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape or device, or a label or index is out of range.
        RuntimeError: a second derivative is requested.
    """
    if shard is None:
        weight, bias = gathered(weight), None if bias is None else gathered(bias)
    else:
        shard.check_rows()
    V, widest = (weight.shape[0],) * 2 if shard is None else (shard.vocab_size, shard.largest)
    D = hidden.shape[-1]
    dtype = check_linear(hidden, weight, bias, labels)
    transform = LogitTransform(softcap, logit_scale)
    S = check_sequences(tuple(labels.shape), sequence_ids, num_sequences, hidden.device)
    chosen = resolve_backend(backend, hidden.device)
    if lengths is not None:
        check_lengths(lengths, S, labels)
    options = HeadOptions(transform, ignore_index, dtype, exact, chosen, shard)
    gradient_dtype = options.gradient_dtype(hidden.device)
    sizes = chunk_sizes(
        chunk_bytes, widest, D, dtype, options.logits_dtype, gradient_dtype, hidden.device, weight.dtype,
        width=pitch(widest, padded=chosen == "triton"),
    )  # fmt: skip
    if shard is None:
        numbers = (softcap, logit_scale, ignore_index, dtype, exact, chosen, list(astuple(sizes)), lengths)
        return _op(hidden, weight, bias, labels, sequence_ids, S, *numbers, check_labels)
    _check_values(labels, V, ignore_index, sequence_ids, S, lengths, check_labels)
    return _Sharded.apply(hidden, weight, bias, labels, sequence_ids, S, options, sizes, lengths)


def _check_values(
    labels: Tensor,
    V: int,
    ignore_index: int,
    sequence_ids: Tensor,
    S: int,
    lengths: Sequence[int] | None,
    check_labels: bool,
) -> None:
    if check_labels:
        check_label_values(labels, V, ignore_index)
        check_sequence_values(sequence_ids, S)
    if lengths is not None and (check_labels or labels.device.type == "cpu"):
        check_length_values(lengths, labels, sequence_ids, ignore_index)


def _kept(labels: Tensor, ignore_index: int, lengths: Sequence[int] | None) -> Tensor:
    """Return the indices of the tokens that count, in order."""
    if lengths is not None:
        # Sorting the ignored tokens to the end needs no synchronisation.
        return torch.argsort(labels == ignore_index, stable=True)[: sum(lengths)]
    return (labels != ignore_index).nonzero().squeeze(-1)


def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    sequence_ids: Tensor,
    num_sequences: int,
    options: HeadOptions,
    sizes: ChunkSizes,
    lengths: Sequence[int] | None,
) -> Tensor:
    """Return (S,) log-probabilities, in one pass over the tokens."""
    logps = torch.zeros(len(labels), dtype=options.wide, device=hidden.device)
    kept = _kept(labels, options.ignore_index, lengths)
    division = sizes.scored(len(kept))
    chunks = split_evenly(kept, division.tokens)
    largest = max(map(len, chunks), default=0)
    head = LinearHead(hidden, weight, bias, labels, options, sizes, division, largest)
    for tokens in chunks:
        logps.index_copy_(0, tokens, head.logps(tokens))
    return load(options.backend).sum_by_sequence(logps, sequence_ids, num_sequences)


def _gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    token_grads: Tensor,
    options: HeadOptions,
    sizes: ChunkSizes,
    lengths: Sequence[int] | None,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of hidden, weight and bias, in another pass: forward and backward for each chunk."""
    kept = _kept(labels, options.ignore_index, lengths)
    division = sizes.of(len(kept), needs[1])
    chunks = split_evenly(kept, division.tokens, hidden.shape[1])
    largest = max(map(len, chunks), default=0)
    head = LinearHead(hidden, weight, bias, labels, options, sizes, division, largest, needs, len(chunks))
    for tokens in chunks:
        head.logps(tokens, for_backward=True)
        head.backward(token_grads.index_select(0, tokens))
    return head.gradients(weight, bias)


class _Sharded(torch.autograd.Function):
    """The operation over ranks. It is not a custom operator, because those cannot take a process group."""

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
        with without_autocast(hidden.device):
            return _forward(hidden, weight, bias, labels, sequence_ids, num_sequences, *options)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, sequence_ids = ctx.saved_tensors
        needs: tuple[bool, bool, bool] = ctx.needs_input_grad[:3]
        token_grads = grad.index_select(0, sequence_ids)
        with without_autocast(hidden.device):
            options, sizes, lengths = ctx.options
            grads = _gradients(hidden, weight, bias, labels, token_grads, options, sizes, lengths, needs)
        return (*(g if needed else None for g, needed in zip(grads, needs, strict=True)), *[None] * 6)


@torch.library.custom_op("bdpo_kernels::linear_sequence_logprob", mutates_args=())
def _op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    sequence_ids: Tensor,
    num_sequences: int,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    dtype: torch.dtype,
    exact: bool,
    backend: str,
    sizes: Sequence[int],
    lengths: Sequence[int] | None,
    check_labels: bool,
) -> Tensor:
    # Values are checked here, not by the caller, where the check would break the graph of torch.compile.
    _check_values(labels, weight.shape[0], ignore_index, sequence_ids, num_sequences, lengths, check_labels)
    options = HeadOptions(LogitTransform(softcap, logit_scale), ignore_index, dtype, exact, backend)
    with without_autocast(hidden.device):
        return _forward(hidden, weight, bias, labels, sequence_ids, num_sequences, options, ChunkSizes(*sizes), lengths)


@_op.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    sequence_ids: Tensor,
    num_sequences: int,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    dtype: torch.dtype,
    *_: object,
) -> Tensor:
    return hidden.new_empty(num_sequences, dtype=torch.promote_types(dtype, torch.float32))


@torch.library.custom_op("bdpo_kernels::linear_sequence_logprob_backward", mutates_args=())
def _backward_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    token_grads: Tensor,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    dtype: torch.dtype,
    exact: bool,
    backend: str,
    sizes: Sequence[int],
    lengths: Sequence[int] | None,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of hidden, weight and bias; an empty tensor for one that is not needed."""
    options = HeadOptions(LogitTransform(softcap, logit_scale), ignore_index, dtype, exact, backend)
    wanted = (needs[0], needs[1], needs[2])
    with without_autocast(hidden.device):
        return _gradients(hidden, weight, bias, labels, token_grads, options, ChunkSizes(*sizes), lengths, wanted)


@_backward_op.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, token_grads: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    grads = [
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        if needed and tensor is not None
        else hidden.new_empty(0)
        for tensor, needed in zip((hidden, weight, bias), options[-1], strict=True)
    ]
    return grads[0], grads[1], grads[2]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    hidden, weight, bias, labels, sequence_ids, _, *ctx.options, _ = inputs
    ctx.save_for_backward(hidden, weight, bias, labels, sequence_ids)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    hidden, weight, bias, labels, sequence_ids = ctx.saved_tensors
    needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[2]]
    token_grads = grad.index_select(0, sequence_ids)
    grads = _backward_op(hidden, weight, bias, labels, token_grads, *ctx.options, needs)
    return (*(g if needed else None for g, needed in zip(grads, needs, strict=True)), *[None] * 12)


def _no_second_derivative(ctx: object, *grads: Tensor) -> tuple[Tensor | None, ...]:
    raise RuntimeError("linear_sequence_logprob has no second derivative; use torch.log_softmax where one is needed")


_op.register_autograd(_backward, setup_context=_setup_context)
_backward_op.register_autograd(_no_second_derivative)
