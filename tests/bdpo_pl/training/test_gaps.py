"""Gaps between training and held-out pairs, and how far they are known."""

import math

import pytest
import torch

from bdpo_pl.training.metrics import PairMeans, gaps


def measured(**metrics):
    """Means and intervals of both splits: each metric is given as (values on training pairs, on held-out pairs)."""
    values, intervals = {}, {}
    for i, split in enumerate(("train_probe", "held_out")):
        means = PairMeans()
        for name, both in metrics.items():
            means.update({name: torch.tensor(both[i])}, torch.ones(len(both[i]), dtype=torch.bool))
        values |= {f"{split}/{name}": value for name, value in means.compute().items()}
        intervals |= {f"{split}/{name}": interval for name, interval in means.intervals.items()}
    return values, intervals


def test_errors_of_independent_splits_add_in_squares():
    found = gaps(*measured(margin=([1.0, 3.0], [0.0, 1.0])))["gap/margin"]
    # Standard errors of the means: 1 and 1/2.
    half = 1.959964 * math.hypot(1.0, 0.5)
    assert (found.value, found.low, found.high) == pytest.approx((1.5, 1.5 - half, 1.5 + half))


def test_a_gap_of_accuracies_is_never_beyond_what_is_possible_and_pairs_that_are_all_right_are_not_certain():
    all_right, all_wrong, mixed = [1.0] * 6, [0.0] * 6, [1.0, 0.0, 0.5]
    # By the square-and-add rule from Wilson's intervals of 6 of 6: 61 % to 100 %.
    same = gaps(*measured(accuracy=(all_right, all_right)))["gap/accuracy"]
    assert (same.value, same.low, same.high) == pytest.approx((0.0, -0.3903, 0.3903), abs=5e-5)
    largest = gaps(*measured(accuracy=(all_right, all_wrong)))["gap/accuracy"]
    assert largest.value == largest.high == 1.0
    assert 0.4 < largest.low < 0.5
    # A normal interval would end at 1.07.
    beside = gaps(*measured(accuracy=(all_right, mixed)))["gap/accuracy"]
    assert 0.5 < beside.high < 1.0


def test_a_gap_without_the_interval_of_a_split_has_none():
    values, intervals = measured(margin=([1.0, 3.0], [0.5]), accuracy=([1.0], [0.0]))
    found = gaps(values, intervals)
    assert found["gap/margin"].value == 1.5
    assert not found["gap/margin"].bounded
    assert found["gap/accuracy"].bounded
    assert gaps({"held_out/margin": 1.0}, {}) == {}
