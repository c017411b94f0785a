"""Documents and rows: a context with several responses is stored, and later computed, only once.

A document is laid out as [context | response | response | …]. Positions restart after the context in every response.
Attention (`bdpo_pl.forward.masks`) separates the responses of a document and the documents of a row: for the model,
each response follows only its context, as in a row of its own.

Shapes: R rows; T positions; S sequences, one per response; N scored tokens.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from enum import Enum
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bdpo_pl.data.tokenization import Ids

# Compiled attention needs whole blocks; with dynamic shapes another length costs no compilation.
BLOCK = 128
"""Multiple of which the length of a single row is."""


class Document(NamedTuple):
    """A context and its responses.

    Attributes:
        context: token ids of the context, at least one.
        responses: (sequence number, token ids) of each response; at least one response, each of at least one token.
        trained: flags of the scored tokens, by sequence number; all tokens of a sequence that is absent are scored.
    """

    context: Ids
    responses: list[tuple[int, Ids]]
    trained: Mapping[int, Sequence[bool]] = MappingProxyType({})

    @property
    def num_tokens(self) -> int:
        """Number of tokens in the document, its context counted once."""
        return len(self.context) + sum(len(ids) for _, ids in self.responses)

    def split(self) -> list[Document]:
        """Return a document for each response, with its own copy of the context."""
        return [self._replace(responses=[response]) for response in self.responses]


class RowLayout(Enum):
    """The way in which documents become the rows of a batch."""

    SPLIT = "split"
    """Each response in its own row behind its context: any causal model reads this."""
    SHARED = "shared"
    """Whole documents, several per row if they fit within the longest one: for dense attention masks, whose cost grows
    with the square of a row's length.
    """
    ONE_ROW = "one_row"
    """All documents in one row: for block-sparse attention, which skips masked blocks."""
    UNPADDED = "unpadded"
    """All documents in one row without padding: for attention of one document at a time."""


@dataclass
class SequenceBatch:
    """Rows of documents and their scored response tokens.

    Attributes:
        input_ids: (R, T) int64, padded on the right.
        position_ids: (R, T) int64, position of each token in its own sequence; 0 on padding.
        documents: (R, T) int32, index of each token's document in its row; −1 on padding.
        branches: (R, T) int32, 0 in a document's context, 1, 2, … in its responses.
        score_index: (N,) int64, index into the flattened (R·T) positions from which each scored token is predicted.
        scored: (U,) int64, the same positions without repetition, in ascending order.
        labels: (N,) int64, the scored tokens.
        sequence_ids: (N,) int64, sequence number of each scored token.
        spans: (S, 4) int64, start and end of each sequence's context, start and end of its response, in flattened
            positions.
        scored_lengths: number of scored tokens of each sequence as Python numbers, so that reading them does not wait
            for a device; None if they are known only on the device.
        shared: true if a row contains more than one sequence, so that it needs its own mask.
        stripe: (number, C) if ranks share the rows (`bdpo_pl.data.stripes`): the model gets every C-th position, and
            the scored tokens are those that are predicted there, by their places among these. The grids and `spans`
            are still those of whole rows, the former padded to a multiple of C. None: all positions.
    """

    input_ids: Tensor
    position_ids: Tensor
    documents: Tensor
    branches: Tensor
    score_index: Tensor
    scored: Tensor
    labels: Tensor
    sequence_ids: Tensor
    spans: Tensor
    scored_lengths: tuple[int, ...] | None
    shared: bool
    stripe: tuple[int, int] | None = None

    @property
    def masked(self) -> bool:
        """True if the model needs masks of whole rows, beside padding."""
        return self.shared or self.stripe is not None

    @property
    def num_sequences(self) -> int:
        """Number of sequences S."""
        return self.spans.shape[0]

    @property
    def num_tokens(self) -> Tensor:
        """Number of tokens in the rows, without padding."""
        return (self.documents >= 0).sum()

    @property
    def attention_mask(self) -> Tensor:
        """(R, T) int64, 1 on tokens and 0 on padding."""
        return (self.documents >= 0).long()

    def to(self, device: torch.device) -> SequenceBatch:
        """Return the batch on `device`."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> SequenceBatch:
        """Return the batch in pinned memory, from which a GPU copies while the host goes on."""
        return self._with(lambda tensor: tensor.pin_memory())

    def _with(self, change: Callable[[Tensor], Tensor]) -> SequenceBatch:
        changed: dict[str, Any] = {
            f.name: change(value) for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **changed)


def parts_of(batch: SequenceBatch, lengths: Tensor) -> SequenceBatch:
    """Return `batch` with each of its S sequences cut in two after a given number of scored tokens.

    Args:
        batch: S sequences.
        lengths: (S,) int64, number of scored tokens in the first part of each sequence.

    Returns:
        2·S sequences in the same rows: 0 … S−1 are the first parts, S … 2S−1 the second parts, which may be empty.
    """
    S, ids = batch.num_sequences, batch.sequence_ids
    counts = torch.bincount(ids, minlength=S)
    order = torch.argsort(ids, stable=True)
    rank = torch.empty_like(ids)
    rank[order] = torch.arange(len(ids), device=ids.device) - (counts.cumsum(0) - counts)[ids[order]]
    rest = rank >= lengths[ids]
    known = None
    if batch.scored_lengths is not None and lengths.device.type == "cpu":
        first = tuple(map(min, batch.scored_lengths, lengths.tolist()))
        known = first + tuple(whole - part for whole, part in zip(batch.scored_lengths, first, strict=True))
    spans = torch.cat([batch.spans, batch.spans])
    return replace(batch, sequence_ids=ids + S * rest, spans=spans, scored_lengths=known)


def renumbered(documents: Sequence[Document]) -> list[Document]:
    """Return `documents` with their sequences numbered from 0, in order."""
    number = itertools.count()
    found = []
    for document in documents:
        numbers = {old: next(number) for old, _ in document.responses}
        found.append(
            Document(
                document.context,
                [(numbers[old], ids) for old, ids in document.responses],
                {numbers[old]: flags for old, flags in document.trained.items() if old in numbers},
            )
        )
    return found


def lay_out(documents: Sequence[Document], layout: RowLayout, pad_id: int) -> SequenceBatch:
    """Lay out `documents` in rows. Every response token is scored, except those that a document excludes.

    Args:
        documents: documents whose sequences are numbered 0 … S−1, in any order.
        layout: way in which rows are formed.
        pad_id: token id that fills the padding; the model does not see it.
    """
    if layout is RowLayout.SPLIT:
        parts = [part for document in documents for part in document.split()]
        rows = [[part] for part in sorted(parts, key=lambda part: part.responses[0][0])]
        T = max(row[0].num_tokens for row in rows)
    elif layout is not RowLayout.SHARED:
        rows = [list(documents)]
        T = sum(document.num_tokens for document in documents)
        T = T if layout is RowLayout.UNPADDED else _row_length(T)
    else:
        T = max(document.num_tokens for document in documents)
        rows = _first_fit(documents, T)
    S = sum(len(document.responses) for document in documents)
    grid = np.zeros((4, len(rows), T), dtype=np.int64)
    grid[0], grid[2] = pad_id, -1
    spans = np.zeros((S, 4), dtype=np.int64)
    # In the order of the sequences, independently of the rows.
    index: list[np.ndarray] = [np.empty(0)] * S
    labels: list[Ids] = [[]] * S
    for r, row in enumerate(rows):
        at = 0
        for d, (context, responses, trained) in enumerate(row):
            first, at = at, at + len(context)
            _write(grid[:, r, first:at], context, 0, d, 0)
            for branch, (s, ids) in enumerate(responses, start=1):
                start, at = at, at + len(ids)
                _write(grid[:, r, start:at], ids, len(context), d, branch)
                spans[s] = np.array([first, first + len(context), start, at]) + r * T
                # The token at position t is predicted from its predecessor; the first one, from the context's last
                # token.
                index[s] = np.arange(spans[s, 2] - 1, spans[s, 3] - 1)
                index[s][0] = spans[s, 1] - 1
                labels[s] = ids
                if s in trained:
                    index[s] = index[s][np.array(trained[s])]
                    labels[s] = [token for token, is_trained in zip(ids, trained[s], strict=True) if is_trained]
    input_ids, position_ids, document_ids, branches = torch.from_numpy(grid)
    lengths = tuple(len(ids) for ids in labels)
    score_index = np.concatenate(index)
    return SequenceBatch(
        input_ids=input_ids,
        position_ids=position_ids,
        documents=document_ids.int(),
        branches=branches.int(),
        score_index=torch.from_numpy(score_index),
        scored=torch.from_numpy(np.unique(score_index)),
        labels=torch.tensor([token for ids in labels for token in ids]),
        sequence_ids=torch.repeat_interleave(torch.arange(S), torch.tensor(lengths)),
        spans=torch.from_numpy(spans),
        scored_lengths=lengths,
        shared=layout is not RowLayout.SPLIT,
    )


def _write(part: np.ndarray, ids: Ids, position: int, document: int, branch: int) -> None:
    part[0] = ids
    part[1] = np.arange(position, position + len(ids))
    part[2] = document
    part[3] = branch


def _first_fit(documents: Sequence[Document], capacity: int) -> list[list[Document]]:
    """Assign documents, longest first, each to the fullest row in which it still fits."""
    rows: list[list[Document]] = []
    free: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for document in sorted(documents, key=lambda d: d.num_tokens, reverse=True):
        size = document.num_tokens
        at = bisect.bisect_left(free, (size, -1))
        if at < len(free):
            left, row = free.pop(at)
        else:
            left, row = capacity, len(rows)
            rows.append([])
        rows[row].append(document)
        bisect.insort(free, (left - size, row))
    return rows


def _row_length(num_tokens: int) -> int:
    """Return `num_tokens` rounded up to whole blocks."""
    return -(-num_tokens // BLOCK) * BLOCK
