"""Documents laid out as rows, by hand and by property."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from makers import rows_alone

from bdpo_pl.data.packing import Document, RowLayout, lay_out


def test_rows_of_their_own_by_hand():
    batch = rows_alone([([5, 6], [7, 8]), ([5], [9])])
    assert batch.input_ids.tolist() == [[5, 6, 7, 8], [5, 9, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.score_index.tolist() == [1, 2, 4]
    assert batch.labels.tolist() == [7, 8, 9]
    assert batch.sequence_ids.tolist() == [0, 0, 1]
    assert batch.scored_lengths == (2, 1)
    assert not batch.shared


def test_lengths_count_the_scored_tokens_alone_and_stay_in_python():
    documents = [Document([5, 6], [(1, [7, 8, 9]), (0, [3, 4])], {1: [True, False, True]})]
    batch = lay_out(documents, RowLayout.SHARED, 0)
    assert batch.scored_lengths == (2, 2)
    assert batch.scored_lengths == tuple(torch.bincount(batch.sequence_ids, minlength=2).tolist())
    assert batch.to(torch.device("meta")).scored_lengths == (2, 2)


def test_shared_row_by_hand():
    batch = lay_out([Document([5, 6], [(0, [7, 8, 9]), (1, [3])]), Document([4], [(2, [1])])], RowLayout.SHARED, 0)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 3], [4, 1, 0, 0, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 2], [0, 1, 0, 0, 0, 0]]
    assert batch.documents.tolist() == [[0] * 6, [0, 0, -1, -1, -1, -1]]
    assert batch.branches.tolist() == [[0, 0, 1, 1, 1, 2], [0, 1, 0, 0, 0, 0]]
    # The first token of both responses is predicted from the prompt's last.
    assert batch.score_index.tolist() == [1, 2, 3, 1, 6]
    assert batch.labels.tolist() == [7, 8, 9, 3, 1]
    assert batch.spans.tolist() == [[0, 2, 2, 5], [0, 2, 5, 6], [6, 7, 7, 8]]
    assert batch.num_tokens == 8
    assert batch.shared


def test_short_documents_share_a_row_below_the_longest():
    documents = [Document([1] * 5, [(i, [2])]) for i in range(2)] + [Document([1] * 11, [(2, [2])])]
    batch = lay_out(documents, RowLayout.SHARED, 0)
    assert batch.input_ids.shape == (2, 12)
    assert batch.documents.tolist() == [[0] * 12, [0] * 6 + [1] * 6]


@pytest.mark.parametrize(("tokens", "length"), [(2, 128), (128, 128), (129, 256), (1025, 1152), (5000, 5120)])
def test_one_row_is_whole_blocks_long(tokens, length):
    documents = [Document([1], [(0, [2] * (tokens - 1))])]
    assert lay_out(documents, RowLayout.ONE_ROW, 0).input_ids.shape == (1, length)


ids = st.lists(st.integers(1, 50), min_size=1, max_size=9)


@settings(max_examples=150, deadline=None)
@given(
    trees=st.lists(st.tuples(ids, st.lists(ids, min_size=1, max_size=3)), min_size=1, max_size=7),
    layout=st.sampled_from(RowLayout),
)
def test_every_sequence_can_be_read_back_from_its_row(trees, layout):
    documents, sequences = [], []
    for context, responses in trees:
        documents.append(Document(context, list(enumerate(responses, start=len(sequences)))))
        sequences += [(context, response) for response in responses]
    batch = lay_out(documents, layout, pad_id=0)
    flat = {name: getattr(batch, name).flatten() for name in ("input_ids", "position_ids", "documents", "branches")}
    assert batch.num_sequences == len(sequences)
    for s, (context, response) in enumerate(sequences):
        a, b, c, d = batch.spans[s].tolist()
        at = torch.cat([torch.arange(a, b), torch.arange(c, d)])
        assert flat["input_ids"][at].tolist() == context + response
        assert flat["position_ids"][at].tolist() == list(range(len(at)))
        assert len(set(flat["documents"][at].tolist())) == 1
        assert set(flat["branches"][a:b].tolist()) == {0}
        assert len(set(flat["branches"][c:d].tolist())) == 1
        # Each label is predicted from the place just before it in its sequence.
        mine = batch.sequence_ids == s
        assert batch.labels[mine].tolist() == response
        assert batch.score_index[mine].tolist() == at[len(context) - 1 : -1].tolist()
    if layout is RowLayout.SPLIT:
        documents = [part for document in documents for part in document.split()]
    assert batch.num_tokens == sum(document.num_tokens for document in documents)
