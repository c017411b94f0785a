"""Batches: which pairs a step sees, and how they become tensors.

Shapes: B pairs; S sequences (2·B in training: the chosen responses 0…B−1, then the rejected B…2B−1); T positions;
N scored tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from bdpo_pl.data.table import PairTable
from bdpo_pl.data.tokenization import Ids

PairKey = tuple[int, float]
"""(index of a pair in its table, weight of its loss)."""


@dataclass
class SequenceBatch:
    """Padded sequences and the response tokens to be scored in them.

    Attributes:
        input_ids: (S, T) int64, padded on the right.
        attention_mask: (S, T) int64, 1 on tokens and 0 on padding.
        score_index: (N,) int64 into the flattened (S·T) positions: where each scored token is predicted from.
        labels: (N,) int64, the scored tokens.
        sequence_ids: (N,) int64, the sequence each scored token belongs to, in order.
    """

    input_ids: Tensor
    attention_mask: Tensor
    score_index: Tensor
    labels: Tensor
    sequence_ids: Tensor

    @property
    def num_sequences(self) -> int:
        """S."""
        return self.input_ids.shape[0]


@dataclass
class PreferenceBatch:
    """B pairs ready for a training or validation step.

    Attributes:
        sequences: the 2·B sequences, chosen then rejected.
        pair_index: (B,) int64, index of each pair in its table.
        pair_weight: (B,) float32; the step's loss is Σ weight·loss. Zero for a pair that only fills a rank's batch.
        lengths: (2, B) int64, response tokens of the chosen and of the rejected.
        num_tokens: tokens in the sequences, padding left out.
    """

    sequences: SequenceBatch
    pair_index: Tensor
    pair_weight: Tensor
    lengths: Tensor
    num_tokens: int


def collate_sequences(sequences: Sequence[tuple[Ids, Ids]], pad_id: int) -> SequenceBatch:
    """Pad (context, response) pairs on the right; every response token is scored.

    Args:
        sequences: S pairs of a non-empty context and a non-empty response.
        pad_id: fills the padding; the model does not see it.
    """
    rows = [context + response for context, response in sequences]
    T = max(map(len, rows))
    input_ids = torch.full((len(rows), T), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros((len(rows), T), dtype=torch.int64)
    index: list[Tensor] = []
    for s, (row, (context, response)) in enumerate(zip(rows, sequences, strict=True)):
        input_ids[s, : len(row)] = torch.tensor(row)
        attention_mask[s, : len(row)] = 1
        # The token at position t is predicted from position t − 1.
        start = s * T + len(context) - 1
        index.append(torch.arange(start, start + len(response)))
    lengths = torch.tensor([len(response) for _, response in sequences])
    labels = torch.tensor([token for _, response in sequences for token in response])
    sequence_ids = torch.repeat_interleave(torch.arange(len(rows)), lengths)
    return SequenceBatch(input_ids, attention_mask, torch.cat(index), labels, sequence_ids)


class PairDataset(Dataset[PairKey]):
    """Hands keys through; `collate` reads the table, so that a batch is built in one go."""

    def __init__(self, table: PairTable, pad_id: int) -> None:
        self.table = table
        self.pad_id = pad_id

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, key: PairKey) -> PairKey:
        return key

    def collate(self, keys: Sequence[PairKey]) -> PreferenceBatch:
        """The batch of the pairs that `keys` name."""
        index = np.array([i for i, _ in keys])
        pairs = [self.table[int(i)] for i in index]
        sequences = collate_sequences(
            [(p.prompt_ids, p.chosen_ids) for p in pairs] + [(p.prompt_ids, p.rejected_ids) for p in pairs],
            self.pad_id,
        )
        lengths = np.stack([self.table.chosen_lengths[index], self.table.rejected_lengths[index]])
        return PreferenceBatch(
            sequences,
            pair_index=torch.from_numpy(index),
            pair_weight=torch.tensor([weight for _, weight in keys], dtype=torch.float32),
            lengths=torch.from_numpy(lengths.astype(np.int64)),
            num_tokens=int(sequences.attention_mask.sum()),
        )


class PairBatchSampler(Sampler[list[PairKey]]):
    """Batches of (index, weight) for one rank, such that a step's loss is the exact mean over the step's pairs.

    A step takes the next `batch_size · world_size · accumulate` pairs of the epoch's order; the last one of an epoch
    may hold fewer, which are then dealt out evenly. Lightning divides every micro-batch's loss by `accumulate` and
    averages over ranks, also in that short step, so each pair's weight is accumulate · world_size / (pairs in the
    step). A rank left with no pair gets one of weight zero, because all ranks must take part.

    Args:
        num_pairs: pairs in the table.
        batch_size: pairs in one micro-batch of one rank.
        epoch: called when a pass begins; each epoch has an order of its own. None keeps the table's order.
        seed: the orders' seed, the same on every rank.
        accumulate: micro-batches to an optimiser step.
        rank: this process.
        world_size: number of processes that split the data.
    """

    def __init__(
        self,
        num_pairs: int,
        batch_size: int,
        *,
        epoch: Callable[[], int] | None = None,
        seed: int = 0,
        accumulate: int = 1,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.num_pairs = num_pairs
        self.batch_size = batch_size
        self.epoch = epoch
        self.seed = seed
        self.accumulate = accumulate
        self.rank = rank
        self.world_size = world_size
        self.skip = 0

    def skip_batches(self, count: int) -> None:
        """Leave out the first `count` batches of the next pass alone: the ones a resumed run has behind it."""
        self.skip = count

    def __len__(self) -> int:
        window = self.batch_size * self.world_size * self.accumulate
        full, rest = divmod(self.num_pairs, window)
        return full * self.accumulate + math.ceil(rest / (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[PairKey]]:
        skip, self.skip = self.skip, 0
        for number, batch in enumerate(self._batches()):
            if number >= skip:
                yield batch

    def _batches(self) -> Iterator[list[PairKey]]:
        order = np.arange(self.num_pairs)
        if self.epoch is not None:
            order = np.random.default_rng([self.seed, self.epoch()]).permutation(self.num_pairs)
        window = self.batch_size * self.world_size * self.accumulate
        for start in range(0, self.num_pairs, window):
            step = order[start : start + window]
            rounds = math.ceil(len(step) / (self.batch_size * self.world_size))
            weight = self.accumulate * self.world_size / len(step)
            shares = np.array_split(step, rounds * self.world_size)
            for share in shares[self.rank :: self.world_size]:
                yield [(int(i), weight) for i in share] or [(int(step[0]), 0.0)]
