"""Samplers: every pair once, every optimiser step an exact mean, budgets kept, epochs shuffled and resumable."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bdpo_pl.data.samplers import PairBatchSampler, TokenBatchSampler, check_budget
from bdpo_pl.errors import InputError


def assert_every_pair_once_in_exact_means(ranks, num_pairs, accumulate):
    real = [i for batches in ranks for batch in batches for i, weight in batch if weight > 0]
    assert sorted(real) == list(range(num_pairs))
    assert_exact_means(ranks, accumulate)


def assert_exact_means(ranks, accumulate):
    # What Lightning does to the weights: each micro-batch divided by `accumulate`, then the mean over ranks.
    for start in range(0, len(ranks[0]), accumulate):
        weights = [w for batches in ranks for batch in batches[start : start + accumulate] for _, w in batch if w > 0]
        np.testing.assert_allclose(np.array(weights) / accumulate / len(ranks), 1 / len(weights), rtol=1e-12)


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
    assert_every_pair_once_in_exact_means(ranks, num_pairs, accumulate)
    # Where the Trainer ends its epochs earlier, it takes a step with what there is.
    most = max(1, len(ranks[0]) - 1 - epoch)
    for sampler in samplers:
        sampler.stop_after(most)
    cut = [list(sampler) for sampler in samplers]
    assert [[[i for i, _ in batch] for batch in batches] for batches in cut] == [
        [[i for i, _ in batch] for batch in batches[:most]] for batches in ranks
    ]
    assert_exact_means(cut, accumulate)


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


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(st.integers(2, 300), min_size=1, max_size=80),
    budget=st.integers(300, 900),
    accumulate=st.integers(1, 3),
    world_size=st.integers(1, 3),
)
def test_token_batches_hold_their_budget_and_exact_means(sizes, budget, accumulate, world_size):
    sizes = np.array(sizes)
    lengths = set()
    for epoch in range(2):
        samplers = [
            TokenBatchSampler(
                sizes,
                budget,
                epoch=lambda epoch=epoch: epoch,
                seed=5,
                accumulate=accumulate,
                rank=rank,
                world_size=world_size,
            )
            for rank in range(world_size)
        ]
        ranks = [list(sampler) for sampler in samplers]
        # As many batches on every rank and in every epoch.
        lengths |= {len(batches) for batches in ranks} | {len(sampler) for sampler in samplers}
        assert all(sum(sizes[i] for i, _ in batch) <= budget for batches in ranks for batch in batches)
        assert_every_pair_once_in_exact_means(ranks, len(sizes), accumulate)
    assert len(lengths) == 1


def realistic_sizes(n=2000):
    return np.random.default_rng(0).lognormal(5.5, 0.6, n).astype(int).clip(20, 4096)


def padding(sizes, batches):
    padded = sum(max(sizes[i] for i, _ in batch) * len(batch) for batch in batches)
    return 1 - sizes.sum() / padded


def test_token_batches_are_full_and_of_like_sizes():
    sizes = realistic_sizes()
    batches = list(TokenBatchSampler(sizes, 8192, epoch=lambda: 0))
    full = [sum(sizes[i] for i, _ in batch) / 8192 for batch in batches]
    assert np.mean(full) > 0.9
    # Padded to its longest pair, a batch would waste little, where batches of any sizes waste most of it.
    assert padding(sizes, batches) < 0.3
    # Nor does any of them, those that go on from one pool into the next included.
    assert max(max(sizes[i] for i, _ in batch) * len(batch) for batch in batches) < 2 * 8192
    anything = PairBatchSampler(len(sizes), len(sizes) // len(batches), epoch=lambda: 0)
    assert padding(sizes, anything) > 0.5
    # And yet a batch's place in the epoch says nothing of its sizes.
    means = [np.mean([sizes[i] for i, _ in batch]) for batch in batches]
    assert abs(np.corrcoef(np.arange(len(means)), means)[0, 1]) < 0.3


def test_token_batches_are_drawn_anew_each_epoch_and_repeat_by_seed():
    sizes = realistic_sizes(500)

    def batches(epoch, seed=1, skip=0):
        sampler = TokenBatchSampler(sizes, 4096, epoch=lambda: epoch, seed=seed)
        sampler.skip_batches(skip)
        return [tuple(i for i, _ in batch) for batch in sampler]

    assert batches(0) == batches(0)
    assert batches(0) != batches(0, seed=2)
    # Not only another order: other pairs meet.
    assert len({frozenset(b) for b in batches(0)} & {frozenset(b) for b in batches(1)}) < len(batches(0)) / 4
    assert batches(0, skip=7) == batches(0)[7:]
    without_order = TokenBatchSampler(sizes, 4096)
    assert list(without_order) == list(without_order)


def test_pair_over_the_budget_is_named():
    with pytest.raises(InputError, match=r"b\.jsonl:2: the pair takes 90 tokens \(2 pairs .*at least 120"):
        check_budget(np.array([50, 90, 120]), 64, ["a", "b.jsonl:2", "c"], "data.max_tokens_per_batch")
    check_budget(np.array([50, 64]), 64, ["a", "b"], "data.max_tokens_per_batch")
    with pytest.raises(ValueError, match="pair 1 has 90"):
        TokenBatchSampler(np.array([50, 90]), 64)
