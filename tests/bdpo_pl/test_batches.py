"""Batches: positions, padding, and the exact mean over the pairs of every optimiser step."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bdpo_pl.data.batches import PairBatchSampler, PairDataset, collate_sequences
from bdpo_pl.data.table import PairTable
from bdpo_pl.data.tokenization import PreferencePair


def test_collated_positions_by_hand():
    batch = collate_sequences([([5, 6], [7, 8]), ([5], [9])], pad_id=0)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8], [5, 9, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.score_index.tolist() == [1, 2, 4]
    assert batch.labels.tolist() == [7, 8, 9]
    assert batch.sequence_ids.tolist() == [0, 0, 1]


def test_training_batch_holds_chosen_then_rejected():
    table = PairTable.from_pairs([PreferencePair([1], [2, 3], [4]), PreferencePair([1, 1], [5], [6, 7, 8])], [1])
    batch = PairDataset(table, 0).collate([(1, 0.5), (0, 0.5)])
    assert batch.sequences.input_ids.tolist() == [[1, 1, 5, 0, 0], [1, 2, 3, 0, 0], [1, 1, 6, 7, 8], [1, 4, 0, 0, 0]]
    assert batch.lengths.tolist() == [[1, 2], [3, 1]]
    assert batch.pair_index.tolist() == [1, 0]
    assert batch.num_tokens == 3 + 3 + 5 + 2


@settings(max_examples=200, deadline=None)
@given(
    num_pairs=st.integers(1, 60),
    batch_size=st.integers(1, 7),
    accumulate=st.integers(1, 4),
    world_size=st.integers(1, 4),
    epoch=st.integers(0, 2),
)
def test_every_pair_once_and_every_step_a_mean(num_pairs, batch_size, accumulate, world_size, epoch):
    samplers = [
        PairBatchSampler(
            num_pairs, batch_size, epoch=lambda: epoch, seed=3, accumulate=accumulate, rank=rank, world_size=world_size
        )
        for rank in range(world_size)
    ]
    ranks = [list(sampler) for sampler in samplers]
    for sampler, batches in zip(samplers, ranks, strict=True):
        assert len(sampler) == len(batches)
        assert all(1 <= len(batch) <= batch_size for batch in batches)
    real = [i for batches in ranks for batch in batches for i, weight in batch if weight > 0]
    assert sorted(real) == list(range(num_pairs))
    # What Lightning does to the weights: each micro-batch divided by `accumulate`, then the mean over ranks.
    for start in range(0, len(ranks[0]), accumulate):
        weights = [w for batches in ranks for batch in batches[start : start + accumulate] for _, w in batch if w > 0]
        np.testing.assert_allclose(np.array(weights) / accumulate / world_size, 1 / len(weights), rtol=1e-12)


def test_orders_differ_by_epoch_and_repeat_by_seed():
    def order(epoch, seed):
        return [i for batch in PairBatchSampler(50, 8, epoch=lambda: epoch, seed=seed) for i, _ in batch]

    assert order(0, 1) == order(0, 1)
    assert order(0, 1) != order(1, 1)
    assert order(0, 1) != order(0, 2)
    assert [i for batch in PairBatchSampler(50, 8) for i, _ in batch] == list(range(50))


def test_skipping_resumes_in_the_middle_of_one_pass_only():
    sampler = PairBatchSampler(20, 3, epoch=lambda: 0)
    whole = list(sampler)
    sampler.skip_batches(4)
    assert list(sampler) == whole[4:]
    assert list(sampler) == whole


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
