"""Gaps between training and held-out pairs, and what is known of their errors."""

import math

import pytest

from bdpo_pl.training.metrics import gaps


def test_errors_of_independent_splits_add_in_squares_and_pairs_that_are_all_right_are_not_certain():
    values = {"train_probe/margin": 2.0, "held_out/margin": 0.5, "train_probe/accuracy": 1.0, "held_out/accuracy": 1.0}
    errors = {"train_probe/margin": 0.3, "held_out/margin": 0.4, "train_probe/accuracy": 0.0, "held_out/accuracy": 0.0}
    assert gaps(values, errors) == {"gap/margin": (1.5, pytest.approx(0.5)), "gap/accuracy": (0.0, None)}
    half_known = gaps(values, {"held_out/accuracy": 0.1, "train_probe/accuracy": 0.0})
    assert half_known["gap/margin"] == (1.5, None)
    assert math.isclose(half_known["gap/accuracy"][1], 0.1)
