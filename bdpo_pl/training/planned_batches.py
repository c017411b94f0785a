"""The micro-batches of a memory plan: pairs that fill the window, or the longest pairs of the data."""

from __future__ import annotations

import numpy as np

from bdpo_pl.data.packing import Document, RowLayout, SequenceBatch, lay_out
from bdpo_pl.data.table import PairTable


def worst_batch(pairs: int, window: int, shared: bool) -> SequenceBatch:
    """Return a batch of `pairs` pairs that fill the window of `window` tokens, half prompt and half response."""
    half = max(1, window // 2)
    documents = [
        Document([0] * max(1, window - half), [(b, [0] * half), (pairs + b, [0] * half)]) for b in range(pairs)
    ]
    return lay_out(documents, RowLayout.SHARED if shared else RowLayout.SPLIT, 0)


def longest_batch(table: PairTable, pairs: int, shared: bool) -> SequenceBatch:
    """Return a batch of the `pairs` longest pairs of `table`, which may meet in a shuffled epoch."""
    longest = np.argsort(-table.num_tokens(shared))[:pairs]
    documents = [
        Document(
            [0] * int(table.prompt_lengths[i]),
            [(b, [0] * int(table.chosen_lengths[i])), (len(longest) + b, [0] * int(table.rejected_lengths[i]))],
        )
        for b, i in enumerate(longest)
    ]
    return lay_out(documents, RowLayout.SHARED if shared else RowLayout.SPLIT, 0)


def pairs_to_fill(max_tokens: int, table: PairTable | None, window: int, shared: bool) -> int:
    """Return how many of the longest pairs have at least `max_tokens` tokens, which no batch of a run exceeds.

    Args:
        max_tokens: maximum number of tokens in a micro-batch.
        table: pairs of the run. None: they all fill the window, half prompt and half response.
        window: number of tokens in the window.
        shared: true if a prompt counts once, false if once for each response.
    """
    if table is None:
        return -(-max_tokens // int(window * (1.5 if shared else 2)))
    tokens = np.cumsum(-np.sort(-table.num_tokens(shared)))
    return min(len(table), 1 + int(np.searchsorted(tokens, max_tokens)))
