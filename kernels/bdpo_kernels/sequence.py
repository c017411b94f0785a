"""`sequence_logprob`: from logits to the log-probability of each sequence, with a gradient, and no (N, V) temporary."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from bdpo_kernels import checks

Backend = Literal["triton", "torch"]


def sequence_logprob(
    logits: Tensor,
    labels: Tensor,
    sequence_ids: Tensor | None = None,
    num_sequences: int | None = None,
    *,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    backend: Backend | None = None,
    check_labels: bool = True,
) -> Tensor:
    """Sum of log softmax(logits)[label] over the tokens of each sequence.

    Logits are read once forward (online log-sum-exp); the backward pass reads them once more and writes their gradient,
    ∂/∂logits[i, v] = g[sequence of i] · (1[v = label i] − softmax(logits[i])[v]). Labels are aligned with the logits:
    `labels[i]` is the token that `logits[i]` predicts, so the caller has shifted them.

    Two forms: packed, with a `sequence_ids` entry for each token, in any order; or padded, where each row is a sequence.
    Any strides will do: a slice such as `logits[:, :-1]` is not copied.

    Args:
        logits: (N, V) packed or (B, T, V) padded; float32, bfloat16, float16, or float64 for gradient checks.
        labels: (N,) or (B, T) int64 in [0, V), or `ignore_index` for tokens that cost nothing and get zero gradient.
        sequence_ids: (N,) int64 or int32 in [0, num_sequences); packed form only.
        num_sequences: S; packed form only.
        ignore_index: the label to ignore.
        inplace_backward: let the backward pass write the gradient over the logits. Only for logits that nothing else
            reads, as those straight from an LM head; the backward pass then runs once.
        backend: `triton` or `torch`; default triton for CUDA tensors, torch otherwise.
        check_labels: check the range of labels and sequence ids. On a GPU that waits for it; callers that have checked
            on the CPU turn it off, and then answer for what out-of-range values do.

    Returns:
        (S,) or (B,) float32 (float64 for float64 logits); 0 for a sequence with no token.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: wrong shape or device, a label or sequence id out of range, or a backend that cannot run here.
    """
    checks.check_sequence_arguments(logits, labels, sequence_ids, num_sequences)
    if check_labels:
        checks.check_range("labels", labels, logits.shape[-1], ignore_index)
        if sequence_ids is not None and num_sequences is not None:
            checks.check_range("sequence_ids", sequence_ids, num_sequences)
    if sequence_ids is None:
        B, T = labels.shape
        sequence_ids, num_sequences = torch.arange(B, device=labels.device).repeat_interleave(T), B
    else:
        logits, labels = logits.unsqueeze(0), labels.unsqueeze(0)
    if inplace_backward and logits.requires_grad:
        checks.check_overwritable(logits)
    name = checks.choose_backend(backend, logits)
    return _SequenceLogprob.apply(logits, labels, sequence_ids, num_sequences, ignore_index, inplace_backward, name)


class _SequenceLogprob(torch.autograd.Function):
    """Works on (B, T, V) logits of any strides; the packed form is B = 1."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        sequence_ids: Tensor,
        num_sequences: int,
        ignore_index: int,
        inplace_backward: bool,
        backend: Backend,
    ) -> Tensor:
        implementation = _implementation(backend)
        token_logp, normalizer = implementation.token_logprobs(logits, labels, ignore_index)
        ctx.save_for_backward(logits, labels, sequence_ids, normalizer)
        ctx.ignore_index = ignore_index
        ctx.inplace = inplace_backward
        ctx.backend = backend
        ctx.overwritten = False
        return implementation.sum_by_sequence(token_logp, sequence_ids, num_sequences)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        # Autograd runs a backward pass with gradients enabled only to differentiate it again.
        if torch.is_grad_enabled():
            raise RuntimeError("sequence_logprob has no second derivative: call backward without create_graph=True")
        if ctx.overwritten:
            raise RuntimeError(
                "sequence_logprob: the first backward pass has overwritten the logits (inplace_backward=True), "
                "so there can be no second; use inplace_backward=False"
            )
        logits, labels, sequence_ids, normalizer = ctx.saved_tensors
        grad_logits = logits.detach() if ctx.inplace else torch.empty_like(logits)
        ctx.overwritten = ctx.inplace
        token_grad = grad_output.index_select(0, sequence_ids).view_as(labels)
        _implementation(ctx.backend).logits_gradient(
            logits, labels, normalizer, token_grad, ctx.ignore_index, grad_logits
        )
        return grad_logits, None, None, None, None, None, None


def _implementation(backend: Backend) -> Any:
    # Imported when first used: triton need not be installed where it is not used.
    if backend == "triton":
        from bdpo_kernels import triton_sequence

        return triton_sequence
    from bdpo_kernels import torch_sequence

    return torch_sequence
