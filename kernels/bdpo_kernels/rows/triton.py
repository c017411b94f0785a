"""Row operations in Triton: the launches of `triton_kernels`. The counterpart in PyTorch is `rows.torch`.

Shapes: B, T rows of logits as two axes (packed input has B = 1); n rows of one chunk; V vocabulary; S sequences.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bdpo_kernels.backends import NONE_IGNORED
from bdpo_kernels.rows import triton_kernels as kernels
from bdpo_kernels.transform import IDENTITY, LogitTransform

_COMPILED = isinstance(kernels.token_logprob_forward, triton.JITFunction)
INTERPRETED = not _COMPILED

LOG_OF_BASE = math.log(2.0)
"""Natural logarithm of the base of the exponentials in the statistics, which are those of y = log2(e) · u."""

# Bytes that a thread loads at once, and bytes that a program reads before it needs the first of them.
_LANE_BYTES = 16
_BLOCK_BYTES = 16_384
# For the kernel that reads its rows twice: one program fills a multiprocessor, so that few rows occupy the cache.
_LARGE_BLOCK_BYTES = 65_536
# Bytes in flight per thread, which determine the number of warps.
_THREAD_BYTES = 64
_SUM_BLOCK = 1_024
_SCALE_BLOCK = 4_096

_TRITON_DTYPE = {torch.float32: tl.float32, torch.float64: tl.float64}


def forward(
    logits: Tensor, labels: Tensor, ignore_index: int, transform: LogitTransform = IDENTITY
) -> tuple[Tensor, Tensor]:
    """Return the log-probability of each row's label, and statistics for `backward`.

    Args:
        logits: (B, T, V) logits, any strides, any floating dtype.
        labels: (B, T) integer labels.
        ignore_index: label of rows that are left out.
        transform: function that turns the raw logits into those of the distribution.

    Returns:
        (B·T,) log-probabilities, 0 at ignored rows; (2, B·T) the two parts of each row's log2 Σ 2^y, for `backward`.
        float32, or float64 for float64 logits.
    """
    B, T, V = logits.shape
    dtype = _accumulator(logits)
    logps = torch.empty(B * T, dtype=dtype, device=logits.device)
    stats = torch.empty(2, B * T, dtype=dtype, device=logits.device)
    if B * T == 0:
        return logps, stats
    with _on_device(logits):
        kernels.token_logprob_forward[(B * T,)](
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
            **_constants(transform, dtype),
            **_blocks(logits, _BLOCK_BYTES),
        )
    return logps, stats


def backward(
    logits: Tensor,
    labels: Tensor,
    token_grads: Tensor,
    stats: Tensor,
    ignore_index: int,
    transform: LogitTransform = IDENTITY,
) -> Tensor:
    """Return the gradient of Σ token_grads · log p(label) with respect to the raw logits, in their dtype.

    Args:
        logits: (B, T, V) logits, as in `forward`.
        labels: (B, T) labels, as in `forward`.
        token_grads: (B·T,) gradient of each row's log-probability.
        stats: second result of `forward`.
        ignore_index: label of rows that are left out.
        transform: function that turns the raw logits into those of the distribution.
    """
    B, T, V = logits.shape
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if out.numel() == 0:
        return out
    block = min(triton.next_power_of_2(V), _BLOCK_BYTES // logits.element_size())
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
            SCALE=transform.scale,
            BLOCK=block,
            num_warps=8 if block >= 4096 else 4,
            enable_fp_fusion=True,
            **_constants(transform, stats.dtype),
        )
    return out


def logprobs(logits: Tensor, labels: Tensor, transform: LogitTransform) -> Tensor:
    """Return the (n,) log-probabilities of the labels of (n, V) logits, none of which is ignored."""
    return forward(logits.unsqueeze(0), labels.unsqueeze(0), NONE_IGNORED, transform)[0]


def logprobs_and_gradient(logits: Tensor, labels: Tensor, transform: LogitTransform, gradient: Tensor) -> Tensor:
    """Return the (n,) log-probabilities, and write a gradient into `gradient`.

    The gradient is that of −log p(label) over `transform.scale`.

    Args:
        logits: (n, V) logits, with strides (any, 1).
        labels: (n,) labels.
        transform: function that turns the raw logits into those of the distribution.
        gradient: (n, V) result, with strides (any, 1); it may be the logits themselves.
    """
    logps = torch.empty(len(labels), dtype=_accumulator(logits), device=logits.device)
    # The statistics are neither read nor written, so any pointer is valid.
    _softmax_gradient(logits, labels, logps, logps, logps, transform, gradient, known=False)
    return logps


def shard_statistics(logits: Tensor, labels: Tensor, transform: LogitTransform) -> tuple[Tensor, Tensor]:
    """Return, for each of (n, v) rows, in base 2, the largest y, and log2 Σ 2^(y − largest)."""
    _, stats = forward(logits.unsqueeze(0), labels.unsqueeze(0), NONE_IGNORED, transform)
    return stats[0], stats[1]


def shard_label(logits: Tensor, labels: Tensor, transform: LogitTransform, shift: Tensor) -> Tensor:
    """Return the (n,) values of y at the labels, minus `shift` (n,).

    The constant factor is rounded in the same way as in the kernels.
    """
    constants = _constants(transform, shift.dtype)
    factor = torch.tensor(constants["FACTOR"], dtype=shift.dtype).item()
    t = logits.gather(-1, labels.long().unsqueeze(-1)).squeeze(-1).double()
    if transform.softcap is not None:
        t = torch.tanh(t / transform.softcap)
    return (t * factor - shift.double()).to(shift.dtype)


def shard_gradient(
    logits: Tensor, labels: Tensor, transform: LogitTransform, shift: Tensor, log_sum: Tensor, gradient: Tensor
) -> None:
    """Write the gradient of `logprobs_and_gradient` for some of the columns, given the statistics of the whole rows.

    Label −1 matches no column.
    """
    _softmax_gradient(logits, labels, shift, shift, log_sum, transform, gradient, known=True)


def scale_(tensor: Tensor, factor: Tensor) -> None:
    """Multiply a contiguous `tensor` by the 0-dimensional `factor`; do nothing if it is 1.

    The factor is read on the device, without synchronisation.
    """
    if tensor.numel():
        with _on_device(tensor):
            kernels.scale_unless_one[(triton.cdiv(tensor.numel(), _SCALE_BLOCK),)](
                tensor, factor, tensor.numel(), BLOCK=_SCALE_BLOCK, num_warps=8
            )


def sum_by_sequence(logps: Tensor, sequence_ids: Tensor, num_sequences: int) -> Tensor:
    """Return (S,) sums of the (N,) `logps`, grouped by `sequence_ids`, in the dtype of `logps`."""
    sums = torch.empty(num_sequences, dtype=logps.dtype, device=logps.device)
    if num_sequences:
        with _on_device(logps):
            kernels.sequence_sum[(num_sequences,)](
                logps.contiguous(), sequence_ids.contiguous(), sums, logps.shape[0], BLOCK=_SUM_BLOCK
            )
    return sums


def _softmax_gradient(
    logits: Tensor,
    labels: Tensor,
    logps: Tensor,
    top: Tensor,
    log_sum: Tensor,
    transform: LogitTransform,
    gradient: Tensor,
    known: bool,
) -> None:
    if not len(labels):
        return
    with _on_device(logits):
        kernels.softmax_gradient[(len(labels),)](
            logits,
            labels.contiguous(),
            logps,
            top,
            log_sum,
            gradient,
            logits.shape[1],
            logits.stride(0),
            gradient.stride(0),
            KNOWN=known,
            **_constants(transform, _accumulator(logits)),
            # float64 needs more registers than the threads of such a large program have.
            **_blocks(logits, _LARGE_BLOCK_BYTES if logits.element_size() < 8 else _LARGE_BLOCK_BYTES // 2),
        )


def _constants(transform: LogitTransform, dtype: torch.dtype) -> dict[str, Any]:
    """Return the constants of every kernel that turns raw logits into exponents of 2."""
    log2_e = math.log2(math.e)
    softcap = transform.softcap
    return {
        "FACTOR": log2_e * transform.scale * (1.0 if softcap is None else softcap),
        "INNER": 0.0 if softcap is None else 2.0 * log2_e / softcap,
        "ACC": _TRITON_DTYPE[dtype],
    }


def _blocks(logits: Tensor, most: int) -> dict[str, Any]:
    """Return the block size and the number of warps of a program that reads a row.

    They determine the order of the sum, so they depend on V alone.
    """
    width = logits.element_size()
    elements = min(triton.next_power_of_2(logits.shape[-1]), most // width)
    lane = min(elements, _LANE_BYTES // width)
    threads = min(1024, max(128, elements * width // _THREAD_BYTES))
    # Set explicitly, because Triton's default changes between releases.
    return {
        "ROWS": elements // lane,
        "LANE": lane,
        "num_warps": threads // _warp_size(),
        "enable_fp_fusion": True,
    }


def _warp_size() -> int:
    return int(triton.runtime.driver.active.get_current_target().warp_size) if _COMPILED else 32


def _accumulator(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _on_device(tensor: Tensor) -> AbstractContextManager[object]:
    # Triton launches on the current device, which may differ from the tensor's.
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
