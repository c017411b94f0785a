"""A rank's share of a batch whose rows are longer than one device can hold: every C-th position of every row.

The responses are at the ends of rows, so contiguous shares would leave the LM head to the last rank. With stripes, all
ranks have about equally many scored tokens.

Shapes: R rows; T positions; t = T/C positions of one rank; N scored tokens.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor

from bdpo_pl.data.packing import BLOCK, SequenceBatch


def stripe_of(batch: SequenceBatch, number: int, of: int) -> SequenceBatch:
    """Return the share of rank `number` of `of`: the tokens that are predicted at its positions.

    Tokens, positions and documents stay those of the whole rows, because every rank needs them for its masks; the model
    gets every `of`-th. The scored tokens are the rank's own, so the sums over a sequence's scored tokens, added over
    all ranks, are those of `batch`. A label is the token after a position, wherever that is, so none is lost between
    two ranks.

    Args:
        batch: whole batch of S sequences. Its rows are padded to a multiple of `of`.
        number: number of the rank.
        of: number of ranks C.
    """
    T = batch.input_ids.shape[1]
    # Compiled attention needs whole blocks.
    step = math.lcm(of, BLOCK) if T % BLOCK == 0 else of
    pad = -T % step
    own = (batch.score_index % T % of == number).nonzero().flatten()
    index, ids = batch.score_index[own], batch.sequence_ids[own]
    local = _local(index, T, pad, of)
    mine = batch.scored[batch.scored % T % of == number]
    lengths = None
    if ids.device.type == "cpu":
        lengths = tuple(ids.bincount(minlength=batch.num_sequences).tolist())
    return replace(
        batch,
        input_ids=F.pad(batch.input_ids, (0, pad)),
        position_ids=F.pad(batch.position_ids, (0, pad)),
        documents=F.pad(batch.documents, (0, pad), value=-1),
        branches=F.pad(batch.branches, (0, pad)),
        score_index=local,
        scored=_local(mine, T, pad, of),
        labels=batch.labels[own],
        sequence_ids=ids,
        scored_lengths=lengths,
        stripe=(number, of),
    )


def _local(index: Tensor, T: int, pad: int, of: int) -> Tensor:
    """Return the places that flattened (R·T) positions of one rank have among its own (R·t)."""
    return index // T * ((T + pad) // of) + index % T // of
