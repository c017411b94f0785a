"""Log-probabilities of sequences from logits: sums of log p(label), with a one-pass backward.

Shapes: N packed tokens; B, T padded sequences and positions; V vocabulary; S sequences.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bdpo_kernels.backends import Backend, load, resolve_backend
from bdpo_kernels.checks import (
    check_floating,
    check_integer,
    check_label_values,
    check_sequence_values,
    check_sequences,
    check_shape,
)


def sequence_logprob(
    logits: Tensor,
    labels: Tensor,
    sequence_ids: Tensor | None = None,
    num_sequences: int | None = None,
    *,
    ignore_index: int = -100,
    backend: Backend | None = None,
    check_labels: bool = True,
) -> Tensor:
    """Sum log softmax(logits)[label] over each sequence.

    Labels are already aligned: label i is the target of row i of the logits. The forward reads the logits once and
    keeps at most two numbers per row; the backward reads them once and writes their gradient once. There is no (N, V)
    temporary, sums are in float32, and results are bitwise identical on every run.

    Args:
        logits: packed (N, V) or padded (B, T, V) logits, with any strides, so `logits[:, :-1]` is read without a copy.
        labels: (N,) or (B, T) labels, int64 or int32. Rows labelled `ignore_index` are not read and get a gradient of
            exactly 0.
        sequence_ids: (N,) integers, the index of each token's sequence, in any order; for packed input only.
        num_sequences: number of sequences S, for packed input. Default: the largest index + 1; this synchronises with
            the GPU.
        ignore_index: label of the tokens that are left out.
        backend: "triton", "torch", or None: Triton for CUDA tensors, PyTorch for others.
        check_labels: check that labels and indices are in range, which synchronises with a GPU. Disable it
            only if they were checked before: unchecked, a label out of range gives NaN in Triton.

    Returns:
        (S,) float32, or float64 for float64 logits; 0 for a sequence without a counting label.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape or device, or a label or index is out of range.
        RuntimeError: a second derivative is requested.
    """
    check_floating("logits", logits)
    if logits.dim() not in (2, 3):
        raise ValueError(f"logits must be packed (N, V) or padded (B, T, V), got shape {tuple(logits.shape)}")
    rows, V = tuple(logits.shape[:-1]), logits.shape[-1]
    if V == 0:
        raise ValueError("logits have an empty vocabulary: their last dimension must be ≥ 1")
    check_integer("labels", labels, logits.device)
    check_shape("labels", labels, rows, "one for each row of logits")
    S = check_sequences(rows, sequence_ids, num_sequences, logits.device)
    chosen = resolve_backend(backend, logits.device)
    return _op(logits, labels, sequence_ids, S, ignore_index, chosen, check_labels)[0]


@torch.library.custom_op("bdpo_kernels::sequence_logprob", mutates_args=())
def _op(
    logits: Tensor,
    labels: Tensor,
    sequence_ids: Tensor | None,
    num_sequences: int,
    ignore_index: int,
    backend: str,
    check_labels: bool,
) -> tuple[Tensor, Tensor]:
    """Return the sums (S,), and what the backward needs besides the logits."""
    # Values are checked here, not by the caller, where the check would break the graph of torch.compile.
    if check_labels:
        check_label_values(labels, logits.shape[-1], ignore_index)
        if sequence_ids is not None:
            check_sequence_values(sequence_ids, num_sequences)
    ops = load(backend)
    logits, labels = _as_padded(logits, labels)
    logps, stats = ops.forward(logits, labels, ignore_index)
    if sequence_ids is not None:
        return ops.sum_by_sequence(logps, sequence_ids, num_sequences), stats
    return logps.view(labels.shape).sum(dim=1, dtype=torch.float64).to(logps.dtype), stats


@_op.register_fake
def _(
    logits: Tensor,
    labels: Tensor,
    sequence_ids: Tensor | None,
    num_sequences: int,
    ignore_index: int,
    backend: str,
    check_labels: bool,
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    rows = labels.numel() if backend == "triton" else 0
    return logits.new_empty(num_sequences, dtype=dtype), logits.new_empty(2, rows, dtype=dtype)


@torch.library.custom_op("bdpo_kernels::sequence_logprob_backward", mutates_args=())
def _backward_op(
    logits: Tensor, labels: Tensor, token_grads: Tensor, stats: Tensor, ignore_index: int, backend: str
) -> Tensor:
    rows, labels = _as_padded(logits, labels)
    return load(backend).backward(rows, labels, token_grads, stats, ignore_index).view(logits.shape)


@_backward_op.register_fake
def _(logits: Tensor, labels: Tensor, token_grads: Tensor, stats: Tensor, ignore_index: int, backend: str) -> Tensor:
    return logits.new_empty(logits.shape)


def _as_padded(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return packed rows as one padded sequence, as a view."""
    return (logits, labels) if logits.dim() == 3 else (logits.unsqueeze(0), labels.unsqueeze(0))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, labels, sequence_ids, _, ctx.ignore_index, ctx.backend, _ = inputs
    ctx.save_for_backward(logits, labels, sequence_ids, output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    logits, labels, sequence_ids, stats = ctx.saved_tensors
    if sequence_ids is None:
        token_grads = grad.unsqueeze(1).expand(labels.shape).reshape(-1)
    else:
        token_grads = grad.index_select(0, sequence_ids)
    dlogits = _backward_op(logits, labels, token_grads, stats, ctx.ignore_index, ctx.backend)
    return dlogits, *[None] * 6


def _no_second_derivative(ctx: object, *grads: Tensor) -> tuple[Tensor | None, ...]:
    raise RuntimeError("sequence_logprob has no second derivative; use torch.log_softmax where one is needed")


_op.register_autograd(_backward, setup_context=_setup_context)
_backward_op.register_autograd(_no_second_derivative)
