"""Rows of logits whose columns are split over ranks: each rank holds the logits of its part of the vocabulary only.

A token's log-probability needs the largest logit and the sum of exponentials of every rank, and the label's logit from
the rank that has it: three numbers per token, combined by two small all-reduces. Neither logits nor weight are
gathered.

Shapes: n tokens of one chunk; V vocabulary; v columns of the vocabulary on this rank.
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
    """The rows of the LM head's weight, which are columns of the logits, that this rank holds.

    Attributes:
        start: index of the first row.
        vocab_size: number of rows V on all ranks together, each with at most V / ranks of them, rounded up.
        group: process group of the ranks that share the vocabulary; None: all ranks.
    """

    start: int
    vocab_size: int
    group: dist.ProcessGroup | None = None

    @property
    def largest(self) -> int:
        """The largest number of rows on a rank. Chunks must have the same size on every rank, so they depend on it."""
        return -(-self.vocab_size // dist.get_world_size(self.group))

    def check_rows(self) -> None:
        """Raise ValueError if a rank has no rows.

        All ranks know this: if only the one without rows raised an error, the others would wait for it.
        """
        ranks = dist.get_world_size(self.group)
        if self.largest * (ranks - 1) >= self.vocab_size:
            raise ValueError(
                f"shard: in parts of {self.largest}, the last of {ranks} ranks would have none of the "
                f"{self.vocab_size} rows of the vocabulary; split it over fewer ranks"
            )


class ShardedRows:
    """Row operations on (n, v) logits, v of V columns; the contract of `bdpo_kernels.backends.PackedRows`.

    Args:
        backend: backend of the operations that a rank does alone.
        shard: columns of this rank.
    """

    def __init__(self, backend: str, shard: VocabShard) -> None:
        self._rows = load(backend)
        self.shard = shard

    def logprobs(self, logits: Tensor, labels: Tensor, transform: LogitTransform) -> Tensor:
        """Return the (n,) log-probabilities of the labels, the same on every rank."""
        return self._joined(logits, labels, transform)[0]

    def logprobs_and_gradient(
        self, logits: Tensor, labels: Tensor, transform: LogitTransform, gradient: Tensor
    ) -> Tensor:
        """Return the (n,) log-probabilities, and write the gradient for this rank's columns."""
        logps, local, top, log_sum = self._joined(logits, labels, transform)
        self._rows.shard_gradient(logits, local, transform, top, log_sum, gradient)
        return logps

    def _joined(
        self, logits: Tensor, labels: Tensor, transform: LogitTransform
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the statistics of the rows over all ranks, each (n,).

        They are log-probabilities, this rank's labels, largest exponents, and logarithms of the sums minus the largest
        exponents.
        """
        local = labels.long() - self.shard.start
        local = torch.where((local >= 0) & (local < logits.shape[1]), local, _NOT_HERE)
        some = local.clamp_min(0)
        to_e = self._rows.LOG_OF_BASE
        largest, log_sum = self._rows.shard_statistics(logits, some, transform)
        top = largest.clone()
        dist.all_reduce(top, dist.ReduceOp.MAX, self.shard.group)
        # A rank whose columns are all −inf contributes nothing.
        share = torch.where(largest == -torch.inf, 0.0, torch.exp((largest - top + log_sum) * to_e))
        at_label = self._rows.shard_label(logits, some, transform, top)
        joined = torch.stack([share, torch.where(local == _NOT_HERE, 0.0, at_label)])
        dist.all_reduce(joined, dist.ReduceOp.SUM, self.shard.group)
        log_sum = joined[0].log() / to_e
        return (joined[1] - log_sum) * to_e, local, top, log_sum

    def reduce(self, grad_hidden: Tensor) -> None:
        """Sum over ranks, in place, the contributions of their columns to the hidden states' gradient."""
        dist.all_reduce(grad_hidden, dist.ReduceOp.SUM, self.shard.group)
