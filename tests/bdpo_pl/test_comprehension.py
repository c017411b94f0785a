"""Estimators against hand-computed values."""

import pytest
import torch

from bdpo_pl.comprehension import comprehension, normalised_hsic

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
