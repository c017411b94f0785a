"""The division of tokens into chunks for the LM head: the size of a chunk, and its tokens.

The logits of half-precision products are float32, and their gradient has half their size. Logits are therefore computed
a block of tokens at a time, and the gradient of a whole chunk of several blocks is kept for the other two products. If
all tokens are one chunk, the block takes the memory of the weight's gradient, which is written only after the last
block. So float32 logits take no more memory than half-precision logits of the same tokens.

Shapes: N packed tokens; D hidden size; V vocabulary (a rank's part, if it is split over ranks); B pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from bdpo_kernels import products

# Bytes of logits in one chunk. CPU: enough rows for the matrix products to run at full speed, no more. GPU: enough
# tokens to occupy it (1 GiB is 3,530 tokens of a vocabulary of 152k in bfloat16), little compared with a model.
_CHUNK_BYTES = {"cpu": 1 << 26}
_GPU_CHUNK_BYTES = 1 << 30
# Fewer rows, in the dtype of the products, make them inefficient, and split most pairs, which are then projected twice.
_MIN_CHUNK_TOKENS = 512
# Rows of a block of logits: the product with fewer reads the weight more slowly than it computes.
_MIN_BLOCK_TOKENS = 256
# Rows of logits start at multiples of this many elements where that lets a GPU read 16 bytes at a time.
_PITCH = 16
# Rows and columns of a product's result that one multiprocessor of a GPU computes at a time.
_TILE_ROWS, _TILE_COLUMNS = 128, 256


@dataclass(frozen=True)
class Division:
    """The division of some tokens into chunks.

    Attributes:
        tokens: maximum number of tokens in a chunk.
        bytes: bytes of a chunk's gradient and a block of logits, or of logits that their gradient overwrites.
        lent: bytes of the weight's gradient that a block of logits may take; 0 with several chunks.
    """

    tokens: int
    bytes: int
    lent: int = 0


@dataclass(frozen=True)
class ChunkSizes:
    """Sizes in bytes that determine the size of a chunk.

    Attributes:
        row: a token's gradient of the logits, or its logits if the gradient overwrites them.
        block_row: a token's logits if they are stored separately from their gradient, else 0.
        half: a token's logits in the dtype of the products. With few tokens, the limit is their size in this dtype; 0:
            the limit does not depend on the number of tokens.
        limit: maximum of logits and their gradients.
        grad: gradient of the weight, in the weight's dtype.
        total: gradient of the weight, in the dtype of sums over chunks.
    """

    row: int
    block_row: int
    half: int
    limit: int
    grad: int
    total: int

    def of(self, tokens: int, weight_grad: bool) -> Division:
        """Return the division of `tokens` tokens whose gradients are computed."""
        if not self.half:
            return Division(max(1, self.limit // max(self.row, self.block_row)), self.limit)
        limit = min(self.limit, max(1, tokens) * self.half)
        if weight_grad:
            # A gradient in half precision is cast from a sum in float32, which one chunk does without.
            saved = self.total if self.grad < self.total else 0
            if tokens * self.row <= limit + saved:
                return Division(max(1, tokens), max(1, tokens) * self.row, min(self.grad, self.total))
            # The cast follows when logits are released.
            limit = max(limit, self.grad if saved else 0)
        block = min(_MIN_BLOCK_TOKENS, -(-tokens // 4)) * self.block_row
        return Division(max(1, (limit - block) // self.row), limit)

    def scored(self, tokens: int) -> Division:
        """Return the division of `tokens` tokens of which only log-probabilities are computed."""
        row = self.block_row or self.row
        if not self.half:
            return Division(max(1, self.limit // row), self.limit)
        limit = min(self.limit, max(1, tokens) * self.half)
        least = min(_MIN_BLOCK_TOKENS, tokens, self.limit // row)
        return Division(max(1, least, limit // row), limit)

    def block(self, largest: int, division: Division) -> int:
        """Return the number of tokens whose logits are computed at a time, if the largest chunk has `largest`."""
        if not self.block_row:
            return largest
        own = (division.bytes - largest * self.row) // self.block_row
        return max(1, min(largest, max(own, division.lent // self.block_row)))


def chunk_sizes(
    chunk_bytes: int | None,
    V: int,
    D: int,
    dtype: torch.dtype,
    logits_dtype: torch.dtype,
    gradient_dtype: torch.dtype,
    device: torch.device,
    grad_dtype: torch.dtype,
    width: int | None = None,
) -> ChunkSizes:
    """Return the sizes of chunks whose logits and their gradients fill `chunk_bytes`; a chunk has at least one token.

    By default, they fill 64 MiB on a CPU, 1 GiB on a GPU, or the bytes of 512 tokens in `dtype` if that is more, and
    never more than the logits of all tokens would in `dtype`; plus the float32 sum of a half-precision gradient, which
    a single chunk does without.

    Args:
        chunk_bytes: bytes of logits and their gradients in memory at a time, or None for the default.
        V: number of rows of the weight.
        D: hidden size.
        dtype: dtype of the products.
        logits_dtype: dtype of the logits.
        gradient_dtype: dtype of the logits' gradient.
        device: device of the logits.
        grad_dtype: dtype of the weight's gradient.
        width: elements from the start of one row of logits to the start of the next. Default: V.

    Raises:
        ValueError: `chunk_bytes` is not positive.
    """
    if chunk_bytes is not None and chunk_bytes < 1:
        raise ValueError(f"chunk_bytes must be ≥ 1, or None for the default; got {chunk_bytes}")
    width = width or V
    default = max(_CHUNK_BYTES.get(device.type, _GPU_CHUNK_BYTES), _MIN_CHUNK_TOKENS * width * dtype.itemsize)
    wide = torch.promote_types(dtype, torch.float32)
    return ChunkSizes(
        row=width * gradient_dtype.itemsize,
        block_row=width * logits_dtype.itemsize if gradient_dtype != logits_dtype else 0,
        half=width * dtype.itemsize if chunk_bytes is None else 0,
        limit=default if chunk_bytes is None else chunk_bytes,
        grad=V * D * grad_dtype.itemsize,
        total=V * D * wide.itemsize,
    )


def gradient_dtype(dtype: torch.dtype, logits_dtype: torch.dtype, device: torch.device, backend: str) -> torch.dtype:
    """Return the dtype of the logits' gradient: the products', or the logits' if half precision gains nothing."""
    slow = device.type == "cpu" and backend == "torch" and not products.has_fast_half(dtype)
    return logits_dtype if slow else dtype


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

    Under autocast there is also a copy of the weight in `dtype`, V·D elements, which is not counted.

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
    narrow = gradient_dtype(dtype, kept, device, "torch" if device.type == "cpu" else "triton")
    sizes = chunk_sizes(None, V, D, dtype, kept, narrow, device, grad_dtype or wide)
    division = sizes.of(N, grad_dtype is not None)
    largest = min(N, division.tokens)
    own = 0 if division.lent else sizes.block(largest, division) * sizes.block_row
    logits = largest * sizes.row + own
    if grad_dtype is None:
        return logits
    if division.tokens >= N:
        return logits + sizes.grad
    # The float32 sum is cast to the weight's dtype after the logits are released.
    return sizes.total + max(logits, sizes.grad if grad_dtype != wide else 0)


def even_sizes(number: int, most: int, columns: int = 0, processors: int = 1) -> list[int]:
    """Return the sizes of the fewest parts of at most `most` tokens that occupy a GPU for the shortest time.

    A product of n tokens' rows is computed in tiles, as many at a time as there are multiprocessors, and the last wave
    of tiles takes as long as a full one. Among sizes that need equally many waves the most even one is chosen: a small
    last part is slow, because its products read the whole weight.

    Args:
        number: number of tokens.
        most: maximum number of tokens in a part.
        columns: columns of the product's result; 0: as many as make every wave full.
        processors: number of multiprocessors.
    """
    if number <= 0:
        return []
    parts = -(-number // most)
    if parts == 1:
        return [number]
    even = -(-number // parts)
    whole = range(-(-even // _TILE_ROWS) * _TILE_ROWS, most + 1, _TILE_ROWS)
    size = min([even, *whole], key=lambda size: _waves(number, size, columns, processors))
    return [min(size, number - start) for start in range(0, number, size)]


def _waves(number: int, size: int, columns: int, processors: int) -> int:
    tiles_across = -(-columns // _TILE_COLUMNS) if columns else processors

    def waves(tokens: int) -> int:
        return -(-(-(-tokens // _TILE_ROWS) * tiles_across) // processors)

    return number // size * waves(size) + waves(number % size)


@cache
def multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors of a GPU, 1 for other devices."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def split_evenly(tokens: Tensor, most: int, columns: int = 0) -> tuple[Tensor, ...]:
    """Split `tokens` into the parts of `even_sizes`; no tokens give no parts."""
    sizes = even_sizes(len(tokens), most, columns, multiprocessors(tokens.device))
    return tokens.split(sizes) if sizes else ()


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
