"""Shares of a batch's rows: together they are the batch."""

import pytest
import torch

from bdpo_pl.data.packing import BLOCK, Document, RowLayout, lay_out
from bdpo_pl.data.stripes import stripe_of

DOCUMENTS = [
    Document([5, 6, 7, 8, 9], [(0, [10, 11, 12, 13]), (2, [14])], {0: [False, True, True, True]}),
    Document([20, 21], [(1, [22, 23, 24]), (3, [25, 26])]),
]


@pytest.mark.parametrize("layout", RowLayout)
@pytest.mark.parametrize("of", [2, 3, 4])
def test_each_token_is_scored_once_where_its_predecessor_is(layout, of):
    batch = lay_out(DOCUMENTS, layout, 0)
    found = []
    for number in range(of):
        share = stripe_of(batch, number, of)
        T = share.input_ids.shape[1]
        assert T % of == 0
        own = share.input_ids[:, number::of].flatten()
        positions = share.position_ids[:, number::of].flatten()
        assert share.num_sequences == batch.num_sequences
        assert share.scored_lengths == tuple((share.sequence_ids == s).sum().item() for s in range(4))
        assert share.scored.tolist() == sorted(set(share.score_index.tolist()))
        found += zip(
            share.sequence_ids.tolist(), share.labels.tolist(),
            own[share.score_index].tolist(), positions[share.score_index].tolist(), strict=True,
        )  # fmt: skip
    ids, places = batch.input_ids.flatten(), batch.position_ids.flatten()
    expected = zip(
        batch.sequence_ids.tolist(), batch.labels.tolist(),
        ids[batch.score_index].tolist(), places[batch.score_index].tolist(), strict=True,
    )  # fmt: skip
    assert sorted(found) == sorted(expected)


def test_padding_belongs_to_no_document_and_whole_blocks_stay_whole():
    share = stripe_of(lay_out(DOCUMENTS, RowLayout.ONE_ROW, 0), 0, 3)
    assert share.input_ids.shape[1] == 3 * BLOCK
    assert share.num_tokens == lay_out(DOCUMENTS, RowLayout.ONE_ROW, 0).num_tokens
    share = stripe_of(lay_out(DOCUMENTS, RowLayout.SPLIT, 0), 2, 4)
    assert share.input_ids.shape == (4, 12)
    assert torch.equal(share.documents[:, 9:], torch.full((4, 3), -1, dtype=torch.int32))
