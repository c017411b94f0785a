"""Estimators and balance weights against hand-computed values."""

import math

import pytest
import torch

from bdpo_pl.comprehension import balance_weights, comprehension, normalised_hsic, scaling_factor

COND, NULL, LENGTH = torch.tensor([-10.0, -30.0]), torch.tensor([-25.0, -24.0]), torch.tensor([5, 6])


@pytest.mark.parametrize(
    ("estimator", "expected"), [("pmi", [3.0, -1.0]), ("pmi_sum", [15.0, -6.0]), ("ifd", [2.5, 0.8])]
)
def test_estimators_by_hand(estimator, expected):
    torch.testing.assert_close(comprehension(estimator, COND, NULL, LENGTH), torch.tensor(expected))


def test_ifd_of_a_certain_response_is_finite():
    assert torch.isfinite(comprehension("ifd", torch.zeros(1), torch.tensor([-3.0]), torch.ones(1))).all()


def test_hsic_needs_its_values_and_unknown_estimators_are_named():
    with pytest.raises(ValueError, match="hidden states"):
        comprehension("hsic", COND, NULL, LENGTH)
    with pytest.raises(ValueError, match="mine"):
        comprehension("mine", COND, NULL, LENGTH)


def test_hsic_is_one_for_the_same_states_and_near_zero_for_independent_ones():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(7, 4096, generator=g)
    assert normalised_hsic(x, 3.0 * x + 2.0).item() == pytest.approx(1.0, abs=1e-5)
    assert normalised_hsic(x, torch.randn(11, 4096, generator=g)).item() < 0.01
    assert normalised_hsic(x, torch.ones(3, 4096)).item() == 0.0


def test_hsic_matches_the_gram_matrix_form_in_float64():
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(3, 16, generator=g), torch.randn(5, 16, generator=g)
    H = torch.eye(16, dtype=torch.float64) - 1 / 16
    K, L = H @ x.double().T @ x.double() @ H, H @ y.double().T @ y.double() @ H
    expected = torch.trace(K @ L) / (K.norm() * L.norm())
    assert normalised_hsic(x, y).item() == pytest.approx(expected.item(), rel=1e-5)


def test_softmax_weights_by_hand():
    w_w, w_l = balance_weights(torch.tensor([2.0, 0.0, -50.0]), torch.tensor([1.0, 0.0, 50.0]), tau=0.5)
    torch.testing.assert_close(w_w, torch.tensor([1 / (1 + math.exp(2.0)), 0.5, 1.0]))
    torch.testing.assert_close(w_w + w_l, torch.ones(3))


def test_ratio_weights_by_hand_and_clamped():
    w_w, w_l = balance_weights(torch.tensor([3.0, -1.0]), torch.tensor([1.0, 1.0]), weighting="ratio")
    torch.testing.assert_close(w_w, torch.tensor([0.25, 1.0]), atol=1e-5, rtol=0)
    torch.testing.assert_close(w_w + w_l, torch.ones(2))
    with pytest.raises(ValueError, match="hard"):
        balance_weights(COND, NULL, weighting="hard")


def test_norm_scale_keeps_the_length_of_the_weight_vector():
    w_w = torch.tensor([0.5, 0.9, 1.0])
    s = scaling_factor(w_w, 1 - w_w, "norm")
    torch.testing.assert_close((s * w_w).square() + (s * (1 - w_w)).square(), torch.full((3,), 2.0))
    torch.testing.assert_close(s[[0, 2]], torch.tensor([2.0, math.sqrt(2.0)]))
    torch.testing.assert_close(scaling_factor(w_w, 1 - w_w, 2.0), torch.full((3,), 2.0))
