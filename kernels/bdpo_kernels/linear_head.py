"""The LM head, a chunk of tokens at a time: logits in one buffer, their gradient over them, products accumulated.

Shapes: N tokens; n tokens of one chunk; D hidden size; V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from bdpo_kernels.backends import PackedRows, load
from bdpo_kernels.rows.sharded import ShardedRows, VocabShard
from bdpo_kernels.transform import LogitTransform

# Bytes of logits in one chunk. CPU: enough rows for the matrix products to run at full speed, no more. GPU: enough
# tokens to fill it (1 GiB is 3,500 tokens of a vocabulary of 152k in bfloat16), small beside a model.
_CHUNK_BYTES = {"cpu": 1 << 26}
_GPU_CHUNK_BYTES = 1 << 30
# Fewer rows starve the products, and split most pairs, which are then projected twice.
_MIN_CHUNK_TOKENS = 512
# Bytes of the slabs in which half-precision products are added to a float32 gradient, where that takes two steps.
_SLAB_BYTES = 1 << 26


def chunk_tokens(chunk_bytes: int | None, V: int, dtype: torch.dtype, device: torch.device) -> int:
    """Tokens in a chunk whose logits fill `chunk_bytes` (default: by device), at least one.

    Raises:
        ValueError: `chunk_bytes` is not positive.
    """
    if chunk_bytes is not None:
        if chunk_bytes < 1:
            raise ValueError(f"chunk_bytes must be ≥ 1, or None for the default; got {chunk_bytes}")
        return max(1, chunk_bytes // (V * dtype.itemsize))
    default = _CHUNK_BYTES.get(device.type, _GPU_CHUNK_BYTES)
    return max(_MIN_CHUNK_TOKENS, default // (V * dtype.itemsize))


@dataclass(frozen=True)
class HeadOptions:
    """How the LM head is walked over.

    Attributes:
        transform: what turns the raw logits into those of the distribution.
        ignore_index: the label of tokens that are left out.
        max_tokens: tokens in a chunk at most.
        dtype: of the products: the tensors' own, or autocast's.
        backend: of the row operations.
        shard: of the vocabulary, where weight and bias are a rank's part of it.
    """

    transform: LogitTransform
    ignore_index: int
    max_tokens: int
    dtype: torch.dtype
    backend: str
    shard: VocabShard | None = None

    @property
    def wide(self) -> torch.dtype:
        """The dtype of log-probabilities and sums: float32, float64 for float64 products."""
        return torch.promote_types(self.dtype, torch.float32)


class LinearHead:
    """One walk over the tokens: `logps` of a chunk, then `backward` of the same chunk if gradients are wanted.

    Args:
        hidden: (N, D).
        weight: (V, D).
        bias: (V,), or None.
        labels: (N,), no ignored ones among the tokens that are walked.
        options: the walk's.
        longest: tokens in the longest chunk.
        needs: whether gradients of hidden, weight and bias are wanted.

    Attributes:
        grad_hidden: (N, D), zero at tokens not walked; None unless wanted.
        grad_weight: (V, D) float32 (float64 for float64); None unless wanted.
        grad_bias: (V,), likewise.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        options: HeadOptions,
        longest: int,
        needs: tuple[bool, bool, bool] = (False, False, False),
    ) -> None:
        self.hidden = hidden
        self.labels = labels
        self.options = options
        self._weight = weight.to(options.dtype)
        self._bias = None if bias is None else bias.to(options.dtype)
        self._shards = None if options.shard is None else ShardedRows(options.backend, options.shard)
        self._rows: PackedRows = load(options.backend) if self._shards is None else self._shards
        V = weight.shape[0]
        self._buffer = torch.empty(min(options.max_tokens, longest), V, dtype=options.dtype, device=hidden.device)
        self.grad_hidden = torch.zeros_like(hidden) if needs[0] else None
        # Written by the first chunk, not cleared before it: of a large vocabulary that is a pass less over it.
        self.grad_weight = torch.empty(weight.shape, dtype=options.wide, device=weight.device) if needs[1] else None
        self._weight_is_written = False
        wants_bias = needs[2] and bias is not None
        self.grad_bias = torch.zeros(V, dtype=options.wide, device=weight.device) if wants_bias else None
        self._chunk: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def logps(self, tokens: Tensor) -> Tensor:
        """(n,) log-probabilities of the labels of `tokens` (n,), indices of at most a chunk of tokens."""
        hidden = self.hidden.index_select(0, tokens).to(self.options.dtype)
        labels = self.labels.index_select(0, tokens)
        logits = self._buffer[: len(tokens)]
        if self._bias is None:
            torch.mm(hidden, self._weight.t(), out=logits)
        else:
            torch.addmm(self._bias, hidden, self._weight.t(), out=logits)
        logps, state = self._rows.forward_in_place(logits, labels, self.options.transform)
        self._chunk = (tokens, hidden, labels, state)
        return logps

    def backward(self, token_grads: Tensor) -> None:
        """Add to the gradients, given those of the last chunk's log-probabilities, (n,)."""
        assert self._chunk is not None
        tokens, hidden, labels, state = self._chunk
        grad = self._buffer[: len(tokens)]
        self._rows.backward_in_place(grad, labels, token_grads, state, self.options.transform)
        if self.grad_hidden is not None:
            self.grad_hidden.index_copy_(0, tokens, torch.mm(grad, self._weight).to(self.grad_hidden.dtype))
        if self.grad_weight is not None:
            add_product(self.grad_weight, grad.t(), hidden, beta=float(self._weight_is_written))
            self._weight_is_written = True
        if self.grad_bias is not None:
            self.grad_bias += grad.sum(dim=0, dtype=self.grad_bias.dtype)
        self._chunk = None

    def gradients(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Those of hidden, weight and bias in their dtypes; an empty tensor, no two the same, for one not wanted."""
        if self.grad_weight is not None and not self._weight_is_written:
            self.grad_weight.zero_()
        if self._shards is not None and self.grad_hidden is not None:
            self._shards.reduce(self.grad_hidden)
        new = self.hidden.new_empty
        return (
            new(0) if self.grad_hidden is None else self.grad_hidden,
            new(0) if self.grad_weight is None else self.grad_weight.to(weight.dtype),
            new(0) if self.grad_bias is None or bias is None else self.grad_bias.to(bias.dtype),
        )


def chunks_of_kept_tokens(labels: Tensor, options: HeadOptions) -> tuple[Tensor, ...]:
    """Indices of the tokens that count, in their order, a chunk in each tensor; none where no token counts."""
    kept = (labels != options.ignore_index).nonzero().squeeze(-1)
    return kept.split(options.max_tokens) if len(kept) else ()


def gathered(weight: Tensor) -> Tensor:
    """`weight`, whole: FSDP2 shards parameters as DTensors."""
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight


def add_product(total: Tensor, left: Tensor, right: Tensor, beta: float) -> None:
    """total (V, D) = beta · total + left (V, n) @ right (n, D), in the precision of `total`; beta 0 reads no total."""
    if left.dtype == total.dtype:
        total.addmm_(left, right, beta=beta)
    elif total.is_cuda and _adds_half_products_in_float32(total.device):
        torch.addmm(total, left, right, out_dtype=total.dtype, beta=beta, out=total)
    else:
        for rows in _slabs(total):
            product = torch.mm(left[rows], right)
            if beta:
                total[rows] += product
            else:
                total[rows] = product


@cache
def _adds_half_products_in_float32(device: torch.device) -> bool:
    """Whether this PyTorch adds a bfloat16 product to a float32 matrix in one step; its support varies by build."""
    half = torch.ones(16, 16, dtype=torch.bfloat16, device=device)
    total = torch.ones(16, 16, dtype=torch.float32, device=device)
    try:
        torch.addmm(total, half, half, out_dtype=torch.float32, beta=1.0, out=total)
    except (RuntimeError, TypeError, NotImplementedError):
        return False
    return bool((total == 17).all())


def _slabs(total: Tensor) -> Iterator[slice]:
    V, D = total.shape
    size = max(1, _SLAB_BYTES // max(1, D * total.element_size()))
    return (slice(start, start + size) for start in range(0, V, size))
