"""Row operations in Triton: the launches of `triton_kernels`. The PyTorch twin is `rows.torch`.

Shapes: B, T rows of logits as two axes (packed input has B = 1); V vocabulary; S sequences.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from bdpo_kernels.backends import NONE_IGNORED
from bdpo_kernels.rows import triton_kernels as kernels
from bdpo_kernels.transform import IDENTITY, LogitTransform

INTERPRETED = not isinstance(kernels.token_logprob_forward, triton.JITFunction)

# One program reads its row in blocks of this many bytes: enough loads in flight to fill the memory bus.
_BLOCK_BYTES = 16_384
_SUM_BLOCK = 1_024

if INTERPRETED:
    _forward = kernels.token_logprob_forward
else:
    # Only the depth of the load pipeline is tuned. The block and the number of warps fix the order of the sum, and with
    # it the last bit, so they follow from V and the dtype alone. The backward is not tuned: tuning would run an
    # in-place kernel several times over live logits.
    _forward = triton.autotune(
        configs=[triton.Config({}, num_warps=8, num_stages=stages) for stages in (1, 2, 3, 4)],
        key=["V", "HAS_SOFTCAP"],
    )(kernels.token_logprob_forward)


def forward(
    logits: Tensor, labels: Tensor, ignore_index: int, transform: LogitTransform = IDENTITY
) -> tuple[Tensor, Tensor]:
    """Log-probability of each row's label.

    Args:
        logits: (B, T, V), any strides, any floating dtype.
        labels: (B, T) integers.
        ignore_index: the label of rows that count nothing.
        transform: what turns the raw logits into those of the distribution.

    Returns:
        (B·T,) log-probabilities, 0 at ignored rows; (2, B·T) the two parts of each row's logsumexp, for `backward`.
        float32, or float64 for float64 logits.
    """
    B, T, V = logits.shape
    dtype = _accumulator(logits)
    logps = torch.empty(B * T, dtype=dtype, device=logits.device)
    stats = torch.empty(2, B * T, dtype=dtype, device=logits.device)
    if B * T == 0:
        return logps, stats
    with _on_device(logits):
        _forward[(B * T,)](
            logits,
            labels,
            logps,
            stats[0],
            stats[1],
            T,
            V,
            *logits.stride(),
            *labels.stride(),
            ignore_index,
            transform.scale,
            transform.softcap or 1.0,
            HAS_SOFTCAP=transform.softcap is not None,
            ACC=_TRITON_DTYPE[dtype],
            BLOCK=_block(logits),
        )
    return logps, stats


def backward(
    logits: Tensor,
    labels: Tensor,
    token_grads: Tensor,
    stats: Tensor,
    ignore_index: int,
    transform: LogitTransform = IDENTITY,
    out: Tensor | None = None,
) -> Tensor:
    """Gradient of Σ token_grads · log p(label) with respect to the raw logits, in their dtype.

    Args:
        logits: (B, T, V), as in `forward`.
        labels: (B, T), as in `forward`.
        token_grads: (B·T,) gradient of each row's log-probability.
        stats: the second result of `forward`.
        ignore_index: as in `forward`.
        transform: as in `forward`.
        out: (B, T, V) to write to; `logits` itself for a backward in place. Default: a new contiguous tensor.
    """
    B, T, V = logits.shape
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device) if out is None else out
    if out.numel() == 0:
        return out
    block = _block(logits)
    with _on_device(logits):
        kernels.token_logprob_backward[(B * T, triton.cdiv(V, block))](
            logits,
            labels,
            stats[0],
            stats[1],
            token_grads.to(stats.dtype).contiguous(),
            out,
            T,
            V,
            *logits.stride(),
            *labels.stride(),
            *out.stride(),
            ignore_index,
            transform.scale,
            transform.softcap or 1.0,
            HAS_SOFTCAP=transform.softcap is not None,
            ACC=_TRITON_DTYPE[stats.dtype],
            BLOCK=block,
            num_warps=8 if block >= 4096 else 4,
        )
    return out


def forward_in_place(logits: Tensor, labels: Tensor, transform: LogitTransform) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the labels of (n, V) logits, none of them ignored.

    Returns:
        (n,) log-probabilities, and a state for `backward_in_place`. The logits may have been overwritten.
    """
    return forward(logits.unsqueeze(0), labels.unsqueeze(0), NONE_IGNORED, transform)


def backward_in_place(
    logits: Tensor, labels: Tensor, token_grads: Tensor, state: Tensor, transform: LogitTransform
) -> None:
    """Write the gradient of Σ token_grads · log p(label) over the (n, V) that `forward_in_place` left."""
    padded = logits.unsqueeze(0)
    backward(padded, labels.unsqueeze(0), token_grads, state, NONE_IGNORED, transform, out=padded)


def shard_statistics(logits: Tensor, labels: Tensor, transform: LogitTransform) -> tuple[Tensor, Tensor, Tensor]:
    """Of each (v,) row: the largest u, log Σ exp(u − largest), and u at its label."""
    logps, stats = forward(logits.unsqueeze(0), labels.unsqueeze(0), NONE_IGNORED, transform)
    largest, log_sum = stats.unbind()
    return largest, log_sum, logps + largest + log_sum


# The kernel compares columns with the label: one below zero equals none.
shard_backward = backward_in_place


def sum_by_sequence(logps: Tensor, sequence_ids: Tensor, num_sequences: int) -> Tensor:
    """(S,) sums of the (N,) `logps`, by each token's index of its sequence, in the dtype of `logps`."""
    sums = torch.empty(num_sequences, dtype=logps.dtype, device=logps.device)
    if num_sequences:
        with _on_device(logps):
            kernels.sequence_sum[(num_sequences,)](
                logps.contiguous(), sequence_ids.contiguous(), sums, logps.shape[0], BLOCK=_SUM_BLOCK
            )
    return sums


_TRITON_DTYPE = {torch.float32: tl.float32, torch.float64: tl.float64}


def _accumulator(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _block(logits: Tensor) -> int:
    return min(triton.next_power_of_2(logits.shape[-1]), _BLOCK_BYTES // logits.element_size())


def _on_device(tensor: Tensor) -> AbstractContextManager[object]:
    # Triton launches on the current device, which need not be the tensor's.
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
