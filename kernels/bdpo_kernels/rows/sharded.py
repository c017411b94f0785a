"""Rows of logits whose columns are split over ranks: each holds a part of the vocabulary and sees no other's logits.

A token's log-probability needs of every rank its largest logit, its sum of exponentials and, from the one that has it,
the label's logit: three numbers a token, joined by two small all-reduces. Neither logits nor weight are ever gathered.

Shapes: n tokens of one chunk; V vocabulary; v columns of it on this rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from bdpo_kernels.backends import load
from bdpo_kernels.transform import LogitTransform

_NOT_HERE = -1


@dataclass(frozen=True)
class VocabShard:
    """Which rows of the LM head's weight, columns of the logits, this rank holds.

    Attributes:
        start: index of its first row.
        vocab_size: V, rows on all ranks together.
        group: the ranks that share the vocabulary; None: all.
    """

    start: int
    vocab_size: int
    group: dist.ProcessGroup | None = None

    @property
    def largest(self) -> int:
        """Rows of the rank that has most: chunks must be of one size on every rank."""
        return -(-self.vocab_size // dist.get_world_size(self.group))


class ShardedRows:
    """Row operations on (n, v) logits, v of V columns; the contract of `bdpo_kernels.backends.PackedRows`.

    Args:
        backend: of the part that a rank does alone.
        shard: this rank's columns.
    """

    def __init__(self, backend: str, shard: VocabShard) -> None:
        self._rows = load(backend)
        self.shard = shard

    def forward_in_place(self, logits: Tensor, labels: Tensor, transform: LogitTransform) -> tuple[Tensor, Tensor]:
        """(n,) log-probabilities of the labels, the same on every rank, and what `backward_in_place` reads."""
        local = self._local(labels, logits.shape[1])
        here = local != _NOT_HERE
        largest, log_sum, at_label = self._rows.shard_statistics(logits, local.clamp_min(0), transform)
        total = largest.clone()
        dist.all_reduce(total, dist.ReduceOp.MAX, self.shard.group)
        # A rank without a column, or with none above −inf, adds nothing.
        share = torch.where(largest == -torch.inf, 0.0, torch.exp(largest - total + log_sum))
        joined = torch.stack([share, torch.where(here, at_label, 0.0)])
        dist.all_reduce(joined, dist.ReduceOp.SUM, self.shard.group)
        log_sum = joined[0].log()
        return joined[1] - total - log_sum, torch.stack([total, log_sum])

    def backward_in_place(
        self, logits: Tensor, labels: Tensor, token_grads: Tensor, state: Tensor, transform: LogitTransform
    ) -> None:
        """Write the gradient of this rank's logits over them."""
        local = self._local(labels, logits.shape[1])
        self._rows.shard_backward(logits, local, token_grads, state, transform)

    def reduce(self, grad_hidden: Tensor) -> None:
        """Add up, in place, what every rank's columns say of the hidden states' gradient."""
        dist.all_reduce(grad_hidden, dist.ReduceOp.SUM, self.shard.group)

    def _local(self, labels: Tensor, v: int) -> Tensor:
        local = labels.long() - self.shard.start
        return torch.where((local >= 0) & (local < v), local, _NOT_HERE)
