"""The division of tokens into chunks for the LM head: the size of a chunk, and its tokens.

Shapes: N packed tokens; D hidden size; V vocabulary (a rank's part, if it is split over ranks); B pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Bytes of logits in one chunk. CPU: enough rows for the matrix products to run at full speed, no more. GPU: enough
# tokens to occupy it (1 GiB is 1,765 tokens of a vocabulary of 152k in float32), little compared with a model.
_CHUNK_BYTES = {"cpu": 1 << 26}
_GPU_CHUNK_BYTES = 1 << 30
# Fewer rows, in the dtype of the products, make them inefficient, and split most pairs, which are then projected twice.
_MIN_CHUNK_TOKENS = 512
# Rows of logits start at multiples of this many elements where that lets a GPU read 16 bytes at a time.
_PITCH = 16


@dataclass(frozen=True)
class ChunkSizes:
    """Numbers of tokens in a chunk.

    Attributes:
        plain: number of tokens in a chunk if no gradient of the weight is computed.
        several: number of tokens in each of several chunks if it is.
        one: number of tokens in a single chunk if it is.
    """

    plain: int
    several: int
    one: int

    def of(self, tokens: int, weight_grad: bool) -> int:
        """Return the maximum number of tokens in a chunk, given the total number `tokens`."""
        if not weight_grad:
            return self.plain
        return max(1, tokens) if tokens <= self.one else self.several


def chunk_sizes(
    chunk_bytes: int | None,
    V: int,
    D: int,
    dtype: torch.dtype,
    logits_dtype: torch.dtype,
    device: torch.device,
    grad_dtype: torch.dtype,
) -> ChunkSizes:
    """Return the sizes of chunks whose logits fill `chunk_bytes`; a chunk has at least one token.

    By default, the logits fill 64 MiB on a CPU, 1 GiB on a GPU, or the bytes of 512 tokens in `dtype` if that is more,
    plus the memory that is not yet used while logits exist. A gradient in half precision is first summed in float32 and
    then cast, after the logits are released: the bytes of the cast are free until then. With a single chunk there is no
    float32 sum: its bytes are free.

    Args:
        chunk_bytes: bytes of logits in memory at a time, or None for the default.
        V: row length of the logits.
        D: hidden size.
        dtype: dtype of the products.
        logits_dtype: dtype of the logits.
        device: device of the logits.
        grad_dtype: dtype of the weight's gradient.

    Raises:
        ValueError: `chunk_bytes` is not positive.
    """
    if chunk_bytes is not None and chunk_bytes < 1:
        raise ValueError(f"chunk_bytes must be ≥ 1, or None for the default; got {chunk_bytes}")
    width = V * logits_dtype.itemsize
    if chunk_bytes is not None:
        size = max(1, chunk_bytes // width)
        return ChunkSizes(size, size, size)
    default = max(_CHUNK_BYTES.get(device.type, _GPU_CHUNK_BYTES), _MIN_CHUNK_TOKENS * V * dtype.itemsize)
    plain = max(1, default // width)
    wide = torch.promote_types(dtype, torch.float32)
    if grad_dtype == wide:
        return ChunkSizes(plain, plain, plain)
    several = max(1, (default + V * D * grad_dtype.itemsize) // width)
    one = max(several, (default + V * D * wide.itemsize) // width)
    return ChunkSizes(plain, several, one)


def pitch(V: int, padded: bool) -> int:
    """Return the number of elements from the start of one row of logits to the start of the next."""
    return -(-V // _PITCH) * _PITCH if padded else V


def head_bytes(
    N: int,
    V: int,
    D: int,
    dtype: torch.dtype,
    device: torch.device,
    grad_dtype: torch.dtype | None,
    logits_dtype: torch.dtype | None = None,
) -> int:
    """Return the bytes of logits and the weight's gradient at the peak of `linear_preference_loss` with N tokens.

    Args:
        N: number of tokens that count.
        V: number of rows of the weight.
        D: hidden size.
        dtype: dtype of the products.
        device: device of the products.
        grad_dtype: dtype of the weight; None if it is frozen.
        logits_dtype: dtype of the logits. Default: float32 or wider.
    """
    wide = torch.promote_types(dtype, torch.float32)
    kept = logits_dtype or wide
    sizes = chunk_sizes(None, V, D, dtype, kept, device, grad_dtype or wide)
    logits = min(N, sizes.of(N, grad_dtype is not None)) * V * kept.itemsize
    if grad_dtype is None:
        return logits
    if sizes.one >= N:
        return logits + V * D * grad_dtype.itemsize
    # The float32 sum is cast to the weight's dtype after the logits are released.
    cast = V * D * grad_dtype.itemsize if grad_dtype != wide else 0
    return V * D * wide.itemsize + max(logits, cast)


def split_evenly(tokens: Tensor, most: int) -> tuple[Tensor, ...]:
    """Split `tokens` into the fewest parts of at most `most`, of about equal size; no tokens give no parts.

    The sizes are even because a small last chunk is slow: its products do not occupy a GPU, yet read the whole weight.
    """
    if not len(tokens):
        return ()
    parts = -(-len(tokens) // most)
    return tokens.split(-(-len(tokens) // parts))


def pairs_evenly(counts: Sequence[int], most: int) -> list[tuple[int, int]]:
    """Split consecutive pairs into the fewest chunks of at most `most` tokens, as ranges [first, last).

    The largest chunk is as small as that number of chunks permits. A pair with more than `most` tokens is a chunk
    alone.

    Args:
        counts: (B,) numbers of tokens of the pairs.
        most: maximum number of tokens in a chunk.
    """
    best = _packed(counts, most)
    low, high = max(1, min(most, max(counts, default=1))), most
    while low < high:
        middle = (low + high) // 2
        chunks = _packed(counts, middle)
        if len(chunks) <= len(best):
            best, high = chunks, middle
        else:
            low = middle + 1
    return best


def _packed(counts: Sequence[int], most: int) -> list[tuple[int, int]]:
    ranges, first, held = [], 0, 0
    for pair, count in enumerate(counts):
        if pair > first and held + count > most:
            ranges.append((first, pair))
            first, held = pair, 0
        held += count
    ranges.append((first, len(counts)))
    return ranges
