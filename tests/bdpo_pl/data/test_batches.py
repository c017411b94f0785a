"""Batches of pairs, and the table that they come from."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from lightning.pytorch.plugins.precision import HalfPrecision
from torch.utils.data._utils.pin_memory import pin_memory

from bdpo_pl.data.batches import PairDataset
from bdpo_pl.data.packing import RowLayout
from bdpo_pl.data.table import PairTable
from bdpo_pl.data.tokenization import PreferencePair


def test_a_pair_has_the_same_digests_beside_a_masked_one():
    pair = PreferencePair([1, 2], [3, 4, 5, 6], [7])
    masked = replace(pair, chosen_trained=(True, False, False, False))
    # Its flags as bytes are those of a further token, 1.
    longer = replace(pair, chosen_ids=[3, 4, 5, 6, 1])
    alone, beside = (PairTable.from_pairs(pairs, [9]) for pairs in ([pair], [masked, pair, longer]))
    assert beside.pair_digests()[1:2] == alone.pair_digests()
    assert len(set(beside.pair_digests())) == 3
    (chosen, rejected), (only_chosen, only_rejected) = beside.response_digests(), alone.response_digests()
    assert len(set(chosen)) == 3
    assert chosen[1:2] == only_chosen
    assert rejected == only_rejected * 3


def test_training_batch_holds_chosen_then_rejected():
    table = PairTable.from_pairs([PreferencePair([1], [2, 3], [4]), PreferencePair([1, 1], [5], [6, 7, 8])], [1])
    batch = PairDataset(table, 0).collate([(1, 0.5), (0, 0.5)])
    assert batch.sequences.input_ids.tolist() == [[1, 1, 5, 0, 0], [1, 2, 3, 0, 0], [1, 1, 6, 7, 8], [1, 4, 0, 0, 0]]
    assert batch.lengths.tolist() == [[1, 2], [3, 1]]
    assert batch.pair_index.tolist() == [1, 0]
    assert batch.num_tokens == 3 + 3 + 5 + 2


@pytest.mark.parametrize("precision", ["16-true", "bf16-true"])
def test_half_precision_rounds_no_weight(precision):
    pairs = [PreferencePair([1], [2, 3], [4]), PreferencePair([1, 1], [5], [6, 7, 8])]
    table = PairTable.from_pairs(pairs, [1], weights=np.array([0.3, 1.7], dtype=np.float32))
    batch = PairDataset(table, 0).collate([(1, 1 / 3), (0, 2 / 3)])
    given = HalfPrecision(precision).convert_input(batch)
    for name in ("pair_weight", "given_weight", "loss_weight"):
        assert torch.equal(getattr(given, name), getattr(batch, name))
    assert given.loss_weight.tolist() == pytest.approx([1.7 / 3, 0.6 / 3], rel=1e-6)


def test_the_loader_pins_every_tensor_of_a_batch(monkeypatch):
    pairs = [PreferencePair([1], [2, 3], [4]), PreferencePair([1, 1], [5], [6, 7, 8])]
    table = PairTable.from_pairs(pairs, [1], weights=np.array([0.3, 1.7], dtype=np.float32))
    batch = PairDataset(table, 0).collate([(1, 0.5), (0, 0.5)])
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.to("meta"))
    pinned = pin_memory(batch)
    for before, after in ((batch, pinned), (batch.sequences, pinned.sequences)):
        for name, value in vars(before).items():
            if isinstance(value, torch.Tensor):
                assert getattr(after, name).is_meta
                assert not value.is_meta
    assert pinned.num_tokens == batch.num_tokens


def test_shared_batch_reads_each_prompt_once():
    table = PairTable.from_pairs([PreferencePair([1], [2, 3], [4]), PreferencePair([1, 1], [5], [6, 7, 8])], [1])
    batch = PairDataset(table, 0, RowLayout.SHARED).collate([(1, 0.5), (0, 0.5)])
    assert batch.sequences.input_ids.tolist() == [[1, 1, 5, 6, 7, 8], [1, 2, 3, 4, 0, 0]]
    assert batch.num_tokens == 6 + 4 == table.num_tokens(shared=True).sum()
    assert table.num_tokens(shared=False).tolist() == [3 + 2, 3 + 5]
    # Chosen 0 and 1, then rejected 0 and 1.
    assert batch.sequences.labels.tolist() == [5, 2, 3, 6, 7, 8, 4]
    assert batch.sequences.sequence_ids.tolist() == [0, 1, 1, 2, 2, 2, 3]


def test_table_round_trip_and_digests():
    pairs = [PreferencePair([1, 2], [3], [4, 5]), PreferencePair([1], [2, 3], [4, 5])]
    table = PairTable.from_pairs(pairs, [9], ["a", "b"])
    assert [table[i] for i in range(2)] == pairs
    # The same tokens in a row, cut elsewhere, are another pair.
    assert len(set(table.pair_digests())) == 2
    reversed_table = table.select(np.array([1, 0]))
    assert reversed_table.places == ["b", "a"]
    assert reversed_table[0] == pairs[1]
    assert table.content_digest() != reversed_table.content_digest()
    assert table.content_digest() != PairTable.from_pairs(pairs, [8]).content_digest()
    with pytest.raises(IndexError):
        table[2]
    assert torch.tensor(table.starts).tolist() == [0, 5, 10]
