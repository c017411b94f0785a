"""Batches of preference pairs: the input of one step.

Shapes: B pairs; sequences 0 … B−1 are the chosen responses, B … 2B−1 the rejected ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from bdpo_pl.data.packing import Document, RowLayout, SequenceBatch, lay_out
from bdpo_pl.data.samplers import PairKey
from bdpo_pl.data.table import PairTable
from bdpo_pl.data.tokenization import Ids, PreferencePair


@dataclass
class PreferenceBatch:
    """B pairs ready for a training or validation step.

    Weights are stored as the bits of float32, because Lightning rounds all floating-point tensors of a batch in
    `16-true` and `bf16-true`; `bits_of` makes them.

    Attributes:
        sequences: 2·B sequences, the chosen responses first, then the rejected ones.
        pair_index: (B,) int64, index of each pair in its table.
        pair_weight_bits: (B,) int32, bits of `pair_weight`.
        lengths: (2, B) int64, numbers of trained tokens in the chosen and in the rejected responses.
        num_tokens: number of tokens in the rows, without padding.
        safe: (2, B) bool, safety of the chosen and of the rejected responses; None if the data does not label it.
        given_weight_bits: (B,) int32, bits of `given_weight`; None if the data has none.
        desirable: (B,) bool, whether each single answer is good; None for pairs.
    """

    sequences: SequenceBatch
    pair_index: Tensor
    pair_weight_bits: Tensor
    lengths: Tensor
    num_tokens: int
    safe: Tensor | None = None
    given_weight_bits: Tensor | None = None
    desirable: Tensor | None = None

    @property
    def pair_weight(self) -> Tensor:
        """Share of each pair in the mean over a step, (B,) float32; zero for one that only fills a batch."""
        return self.pair_weight_bits.view(torch.float32)

    @property
    def given_weight(self) -> Tensor | None:
        """The data's own factor of each pair's loss, (B,) float32; None if it has none."""
        return None if self.given_weight_bits is None else self.given_weight_bits.view(torch.float32)

    @property
    def loss_weight(self) -> Tensor:
        """Factor of each pair's loss, (B,) float32: `pair_weight` times the data's own."""
        return self.pair_weight if self.given_weight is None else self.pair_weight * self.given_weight

    def pin_memory(self) -> PreferenceBatch:
        """Return the batch in pinned memory, from which a GPU copies while the host goes on; the loader calls this."""
        pinned: dict[str, Any] = {
            name: value.pin_memory() for name, value in vars(self).items() if isinstance(value, Tensor | SequenceBatch)
        }
        return replace(self, **pinned)


def bits_of(weights: Tensor) -> Tensor:
    """Return the bits of `weights` (B,) as float32, (B,) int32."""
    return weights.float().view(torch.int32)


def pair_documents(pairs: Sequence[PreferencePair]) -> list[Document]:
    """Return a document for each pair. Its sequences are numbered as in a `PreferenceBatch`."""
    return [pair_document(pair, b, len(pairs) + b) for b, pair in enumerate(pairs)]


def pair_document(pair: PreferencePair, chosen: int, rejected: int, context: Ids | None = None) -> Document:
    """Return the document of one pair.

    Args:
        pair: the pair.
        chosen: sequence number of the chosen response.
        rejected: sequence number of the rejected response.
        context: token ids that the responses follow. Default: the pair's prompt.
    """
    trained = {chosen: pair.chosen_trained, rejected: pair.rejected_trained}
    return Document(
        pair.prompt_ids if context is None else context,
        [(chosen, pair.chosen_ids), (rejected, pair.rejected_ids)],
        {number: flags for number, flags in trained.items() if flags is not None},
    )


class PairDataset(Dataset[PairKey]):
    """A dataset that returns the keys unchanged; `collate` reads the table, so that a batch is built in one go.

    Args:
        table: the pairs.
        pad_id: token id that fills the padding.
        layout: way in which the pairs become rows.
    """

    def __init__(self, table: PairTable, pad_id: int, layout: RowLayout = RowLayout.SPLIT) -> None:
        self.table = table
        self.pad_id = pad_id
        self.layout = layout

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, key: PairKey) -> PairKey:
        return key

    def collate(self, keys: Sequence[PairKey]) -> PreferenceBatch:
        """Return the batch of the pairs that `keys` name."""
        index = np.array([i for i, _ in keys])
        sequences = lay_out(pair_documents([self.table[int(i)] for i in index]), self.layout, self.pad_id)
        lengths = self.table.trained_lengths[:, index]
        return PreferenceBatch(
            sequences,
            pair_index=torch.from_numpy(index),
            pair_weight_bits=bits_of(torch.tensor([weight for _, weight in keys], dtype=torch.float32)),
            lengths=torch.from_numpy(lengths.astype(np.int64)),
            num_tokens=int(sequences.num_tokens),
            safe=None if self.table.safe is None else torch.from_numpy(self.table.safe[:, index]),
            given_weight_bits=(
                None if self.table.weights is None else bits_of(torch.from_numpy(self.table.weights[index]))
            ),
            desirable=None if self.table.desirable is None else torch.from_numpy(self.table.desirable[index]),
        )
