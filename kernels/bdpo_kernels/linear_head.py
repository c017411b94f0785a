"""The LM head, a chunk of tokens at a time: logits, block by block, their gradient, and accumulated products.

The gradient of a loss L with respect to a token's logits is g · scale · (1[label] − p) with g = ∂L/∂log p(label), one
number per token. The row operations write only p − 1[label]. −g · scale then multiplies the token's hidden state
before the product for the weight, and the token's row after the product for the hidden states. The row operations
therefore need no gradient of the loss, and no scaling of V elements per token is needed.

A gradient of the same dtype as the logits overwrites them. If it is narrower (half-precision products), float32 logits
exist for one block of the chunk's tokens at a time, in addition to the gradient of the whole chunk.

Shapes: N tokens; n tokens of one chunk; D hidden size; V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bdpo_kernels.backends import PackedRows, load
from bdpo_kernels.chunks import ChunkSizes, Division, even_sizes, gradient_dtype, pitch
from bdpo_kernels.products import add_weight_product, hidden_product, weighted_sum, write_logits
from bdpo_kernels.rows.sharded import ShardedRows, VocabShard
from bdpo_kernels.transform import LogitTransform


@dataclass(frozen=True)
class HeadOptions:
    """Options of a pass of the tokens through the LM head.

    Attributes:
        transform: function that turns the raw logits into those of the distribution.
        ignore_index: label of tokens that are left out.
        dtype: dtype of the products: the tensors' own, or autocast's.
        exact: keep the logits of half-precision products in float32.
        backend: backend of the row operations.
        shard: this rank's part of the vocabulary, if weight and bias are split over ranks.
    """

    transform: LogitTransform
    ignore_index: int
    dtype: torch.dtype
    exact: bool
    backend: str
    shard: VocabShard | None = None

    @property
    def wide(self) -> torch.dtype:
        """The dtype of log-probabilities and sums: float32, or float64 for float64 products."""
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def logits_dtype(self) -> torch.dtype:
        """The dtype of the logits."""
        return self.wide if self.exact else self.dtype

    def gradient_dtype(self, device: torch.device) -> torch.dtype:
        """Return the dtype of the logits' gradient."""
        return gradient_dtype(self.dtype, self.logits_dtype, device, self.backend)


class _Chunk(NamedTuple):
    tokens: Tensor
    hidden: Tensor
    gradient: Tensor


class LinearHead:
    """One pass over the tokens: log-probabilities of a chunk, then optionally `backward` of the same chunk.

    Args:
        hidden: (N, D) hidden states.
        weight: (V, D) weight of the LM head.
        bias: (V,) bias of the LM head, or None.
        labels: (N,) labels; no token that is passed to `logps` may have an ignored one.
        options: options of the pass.
        sizes: bytes of logits and gradients, from which the number of logits at a time follows.
        division: division of the tokens into chunks.
        largest: number of tokens in the largest chunk.
        needs: flags for hidden, weight and bias, true if the gradient is needed.
        chunks: number of calls of `backward`; with a single one, the weight's gradient needs no float32 sum.

    Attributes:
        grad_hidden: (N, D) gradient, zero at tokens that were not processed; None if not needed.
        grad_weight: (V, D) gradient, in float32 (float64 for float64) if there are several chunks, else in the weight's
            dtype if that is no wider than float32, or the products are in float64; None if not needed.
        grad_bias: (V,) gradient in float32 (float64 for float64); None if not needed.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        options: HeadOptions,
        sizes: ChunkSizes,
        division: Division,
        largest: int,
        needs: tuple[bool, bool, bool] = (False, False, False),
        chunks: int = 1,
    ) -> None:
        self.hidden = hidden
        self.labels = labels
        self.options = options
        V, device = weight.shape[0], hidden.device
        self._weight = weight.to(options.dtype)
        self._bias = None if bias is None else bias.to(options.logits_dtype)
        self._shards = None if options.shard is None else ShardedRows(options.backend, options.shard)
        self._rows: PackedRows = load(options.backend) if self._shards is None else self._shards
        # Contiguous, as the fake implementation says, whatever the strides of `hidden` are.
        self.grad_hidden = torch.zeros(hidden.shape, dtype=hidden.dtype, device=device) if needs[0] else None
        # Clearing it first would cost one more pass over the large matrix, so the first chunk overwrites it instead.
        sums = torch.promote_types(weight.dtype, options.dtype)
        if chunks > 1 or sums.itemsize > options.wide.itemsize:
            sums = options.wide
        self.grad_weight = torch.empty(weight.shape, dtype=sums, device=weight.device) if needs[1] else None
        self._weight_is_written = False
        wants_bias = needs[2] and bias is not None
        self.grad_bias = torch.zeros(V, dtype=options.wide, device=weight.device) if wants_bias else None
        self._chunk: _Chunk | None = None
        stride = pitch(V, padded=options.backend == "triton")
        narrow = options.gradient_dtype(device)
        apart = any(needs) and narrow != options.logits_dtype
        self._block = min(max(1, largest), sizes.block(largest, division))
        # In one chunk, the weight's gradient is written after the last block of logits.
        lent = self.grad_weight if apart and division.lent and chunks == 1 else None
        rows = self._block if apart or not any(needs) else largest
        self._logits: Tensor | None = _rows_of(lent, rows, stride, options.logits_dtype)
        if self._logits is None:
            self._logits = torch.empty(rows, stride, dtype=options.logits_dtype, device=device)
        self._gradient: Tensor | None = torch.empty(largest, stride, dtype=narrow, device=device) if apart else None

    def logps(self, tokens: Tensor, for_backward: bool = False) -> Tensor:
        """Return the (n,) log-probabilities of the labels of `tokens`.

        Args:
            tokens: (n,) indices of the tokens, at most as many as the largest chunk has.
            for_backward: compute the logits' gradient as well, for `backward`.
        """
        assert self._logits is not None
        n, V = len(tokens), self._weight.shape[0]
        hidden = self.hidden.index_select(0, tokens).to(self.options.dtype)
        labels = self.labels.index_select(0, tokens)
        gradient = (self._logits if self._gradient is None else self._gradient)[:n, :V]
        in_place = self._gradient is None and for_backward
        parts, start = [], 0
        for size in [n] if in_place else even_sizes(n, self._block) or [0]:
            rows = slice(start, start + size)
            logits = self._logits[:size, :V]
            write_logits(logits, hidden[rows], self._weight, self._bias)
            if for_backward:
                parts.append(
                    self._rows.logprobs_and_gradient(logits, labels[rows], self.options.transform, gradient[rows])
                )
            else:
                parts.append(self._rows.logprobs(logits, labels[rows], self.options.transform))
            start += size
        if for_backward:
            self._chunk = _Chunk(tokens, hidden, gradient)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def backward(self, token_grads: Tensor) -> None:
        """Add to the gradients, given the (n,) gradients of the last chunk's log-probabilities."""
        assert self._chunk is not None
        tokens, hidden, gradient = self._chunk
        # Logits that took the memory of the weight's gradient are overwritten below.
        self._chunk = None
        factors = self._factors(token_grads)
        column = factors.unsqueeze(-1)
        if self.grad_hidden is not None:
            product = hidden_product(gradient, self._weight).mul_(column)
            self.grad_hidden.index_copy_(0, tokens, product.to(self.grad_hidden.dtype))
        if self.grad_weight is not None:
            # `hidden` is our own copy, so it may be scaled in place.
            scaled = hidden.mul_(column) if hidden.dtype == gradient.dtype else hidden * column
            add_weight_product(self.grad_weight, gradient, scaled, self._weight_is_written)
            self._weight_is_written = True
        if self.grad_bias is not None:
            self.grad_bias += weighted_sum(gradient, factors)

    def backward_to_hidden(self) -> None:
        """Write the gradient of the last chunk's hidden states, without the factors of `scale_hidden`."""
        assert self._chunk is not None
        assert self.grad_hidden is not None
        tokens, _, gradient = self._chunk
        self._chunk = None
        self.grad_hidden.index_copy_(0, tokens, hidden_product(gradient, self._weight).to(self.grad_hidden.dtype))

    def scale_hidden(self, tokens: Tensor, token_grads: Tensor) -> None:
        """Multiply what `backward_to_hidden` has written by the gradients of the log-probabilities of `tokens`."""
        assert self.grad_hidden is not None
        scaled = self.grad_hidden.index_select(0, tokens) * self._factors(token_grads).unsqueeze(-1)
        self.grad_hidden.index_copy_(0, tokens, scaled.to(self.grad_hidden.dtype))

    def _factors(self, token_grads: Tensor) -> Tensor:
        return token_grads.to(self.options.wide) * -self.options.transform.scale

    def gradients(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of hidden, weight and bias, each in the dtype of its tensor.

        A gradient that is not needed is an empty tensor, a new one for each.
        """
        # Converting the weight's gradient to its dtype takes memory, so the buffer is released first.
        self._logits = self._gradient = self._chunk = None
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


def _rows_of(memory: Tensor | None, rows: int, stride: int, dtype: torch.dtype) -> Tensor | None:
    """Return a (rows, stride) tensor of `dtype` in the memory of another; None if that is too small."""
    if memory is None or rows * stride * dtype.itemsize > memory.numel() * memory.itemsize:
        return None
    needed = rows * stride * dtype.itemsize // memory.itemsize
    return memory.view(-1)[:needed].view(dtype).view(rows, stride)


def gathered(tensor: Tensor) -> Tensor:
    """Return the full `tensor`: FSDP2 shards parameters as DTensors.

    Its gradient is the mean over the ranks, each of which may have other tokens, as FSDP2 and DDP take it. If all have
    the same tokens, this is the gradient of each.
    """
    if not hasattr(tensor, "full_tensor"):
        return tensor
    from torch.distributed.tensor import DTensor, Partial

    assert isinstance(tensor, DTensor)
    ranks = tensor.device_mesh.size()
    full = tensor.full_tensor(grad_placements=[Partial()] * tensor.device_mesh.ndim)
    if full.requires_grad and ranks > 1:
        # gloo has no averaging reduce-scatter; asked for one, it returns the sum.
        full.register_hook(lambda grad: grad / ranks)
    return full
