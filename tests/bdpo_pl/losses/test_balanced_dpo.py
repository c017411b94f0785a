"""Losses against the closed forms, float64 autograd and the plain DPO formula."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from pairs import Pairs, pairs_of

from bdpo_pl.errors import InputError
from bdpo_pl.losses import BalancedDPOLoss, BalancedLoss, DPOLoss, PreferenceLoss
from bdpo_pl.losses.balanced_dpo import balance_weights, imbalance_spread, scaling_factor


def make_pairs(B=64, seed=0, requires_grad=True) -> Pairs:
    g = torch.Generator().manual_seed(seed)

    def draw(scale, offset=0.0):
        return torch.randn(B, generator=g) * scale + offset

    policy = [draw(20.0, -60.0).requires_grad_(requires_grad) for _ in range(2)]
    lengths = [torch.randint(1, 60, (B,), generator=g) for _ in range(2)]
    reference = [draw(20.0, -60.0) for _ in range(2)]
    return pairs_of(*policy, *lengths, *reference, draw(1.5), draw(1.5))


@pytest.mark.parametrize("scale", [1.0, 2.0, "norm", None])
@pytest.mark.parametrize(("weighting", "estimator"), [("softmax", "pmi"), ("ratio", "ifd")])
def test_gradients_match_closed_form(scale, weighting, estimator):
    pairs = make_pairs()
    loss = BalancedDPOLoss(beta=0.3, tau=0.7, scale=scale, weighting=weighting, estimator=estimator)
    pairs.under(loss).sum().backward()

    w_w, w_l = balance_weights(pairs.comprehension_chosen, pairs.comprehension_rejected, 0.7, weighting)
    s = scaling_factor(w_w, w_l, 2.0 if scale is None else scale).double()
    d_w = (pairs.policy_chosen - pairs.reference_chosen).detach().double()
    d_l = (pairs.policy_rejected - pairs.reference_rejected).detach().double()
    z = 0.3 * s * (w_w.double() * d_w - w_l.double() * d_l)
    torch.testing.assert_close(
        pairs.policy_chosen.grad.double(), -0.3 * s * w_w * torch.sigmoid(-z), rtol=1e-4, atol=1e-7
    )
    torch.testing.assert_close(
        pairs.policy_rejected.grad.double(), 0.3 * s * w_l * torch.sigmoid(-z), rtol=1e-4, atol=1e-7
    )


def test_dpo_is_balanced_dpo_with_balance_off_bit_for_bit():
    a, b, c = make_pairs(), make_pairs(), make_pairs()
    plain = -F.logsigmoid(0.1 * ((c.policy_chosen - c.reference_chosen) - (c.policy_rejected - c.reference_rejected)))
    dpo, off = a.under(DPOLoss(beta=0.1)), b.under(BalancedDPOLoss(beta=0.1, balance=False))
    assert torch.equal(dpo, plain)
    assert torch.equal(off, plain)
    for loss in (plain, dpo, off):
        loss.mean().backward()
    for pairs in (a, b):
        assert torch.equal(pairs.policy_chosen.grad, c.policy_chosen.grad)
        assert torch.equal(pairs.policy_rejected.grad, c.policy_rejected.grad)


def test_balanced_pair_at_scale_two_is_dpo():
    pairs = make_pairs(requires_grad=False)
    balanced = Pairs(**{**vars(pairs), "comprehension_rejected": pairs.comprehension_chosen})
    torch.testing.assert_close(balanced.under(BalancedDPOLoss(tau=0.25)), pairs.under(DPOLoss()), rtol=1e-6, atol=1e-7)


def test_ablation_cells():
    pairs = make_pairs(requires_grad=False)
    d_w, d_l = pairs.log_ratios(*pairs.policy)
    w_w, w_l = balance_weights(pairs.comprehension_chosen, pairs.comprehension_rejected, 0.25)
    bw = pairs.under(BalancedDPOLoss(tau=0.25, scale=1.0))
    sf = pairs.under(BalancedDPOLoss(balance=False, scale=2.0))
    torch.testing.assert_close(bw, -F.logsigmoid(0.1 * (w_w * d_w - w_l * d_l)))
    torch.testing.assert_close(sf, -F.logsigmoid(0.2 * (d_w - d_l)))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.49])
@pytest.mark.parametrize("loss_class", [DPOLoss, partial(BalancedDPOLoss, tau=0.25)])
def test_loss_is_ln2_when_policy_equals_reference(loss_class, smoothing):
    pairs = make_pairs(requires_grad=False)
    same = Pairs(
        **{**vars(pairs), "reference_chosen": pairs.policy_chosen, "reference_rejected": pairs.policy_rejected}
    )
    losses = same.under(loss_class(label_smoothing=smoothing))
    torch.testing.assert_close(losses, torch.full_like(losses, math.log(2)), rtol=0, atol=1e-6)
    assert loss_class().initial_value == math.log(2)


def test_label_smoothing_by_hand():
    one = torch.tensor([1.0])
    zero = torch.zeros(1)
    pairs = pairs_of(one * 3.0, zero, one, one, zero, zero)
    # z = 0.5 · 3 = 1.5
    expected = 0.8 * math.log(1 + math.exp(-1.5)) + 0.2 * math.log(1 + math.exp(1.5))
    assert pairs.under(DPOLoss(beta=0.5, label_smoothing=0.2)).item() == pytest.approx(expected, rel=1e-6)


def test_half_precision_inputs_are_accumulated_in_float32():
    pairs = make_pairs(requires_grad=False)
    given = {name: tensor for name, tensor in vars(pairs).items() if tensor is not None}
    half = Pairs(**{k: v.bfloat16() if v.is_floating_point() else v for k, v in given.items()})
    assert half.under(BalancedDPOLoss(tau=0.25)).dtype == torch.float32


def test_better_comprehended_side_gets_the_smaller_gradient():
    zero = torch.zeros(1)
    chosen, rejected = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    pairs = pairs_of(chosen, rejected, zero + 1, zero + 1, zero, zero, zero + 2.0, zero + 0.5)
    pairs.under(BalancedDPOLoss(tau=0.25)).sum().backward()
    assert abs(chosen.grad.item()) < abs(rejected.grad.item())


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"beta": 0.0}, "beta"),
        ({"beta": float("nan")}, "beta"),
        ({"tau": -1.0}, "tau"),
        ({"max_weight_ratio": 1.0}, "max_weight_ratio"),
        ({"scale": 0.0}, "scale"),
        ({"label_smoothing": 0.5}, "label_smoothing"),
        ({"weighting": "hard"}, "weighting"),
        ({"estimator": "mine"}, "estimator"),
        ({"weighting": "ratio"}, "ifd"),
    ],
)
def test_bad_arguments_are_named(arguments, named):
    with pytest.raises(InputError, match=named):
        BalancedDPOLoss(**arguments)


def test_missing_reference_or_comprehension_is_an_error():
    pairs = make_pairs(requires_grad=False)
    with pytest.raises(ValueError, match="reference"):
        Pairs(**{**vars(pairs), "reference_chosen": None}).under(DPOLoss())
    with pytest.raises(ValueError, match="comprehension"):
        Pairs(**{**vars(pairs), "comprehension_chosen": None}).under(BalancedDPOLoss(tau=0.25))


def test_softmax_weights_by_hand():
    w_w, w_l = balance_weights(torch.tensor([2.0, 0.0, -50.0]), torch.tensor([1.0, 0.0, 50.0]), tau=0.5)
    torch.testing.assert_close(w_w, torch.tensor([1 / (1 + math.exp(2.0)), 0.5, 1.0]))
    torch.testing.assert_close(w_w + w_l, torch.ones(3))


def test_ratio_weights_by_hand_and_clamped():
    w_w, w_l = balance_weights(torch.tensor([3.0, -1.0]), torch.tensor([1.0, 1.0]), tau=1.0, weighting="ratio")
    torch.testing.assert_close(w_w, torch.tensor([0.25, 1.0]), atol=1e-5, rtol=0)
    torch.testing.assert_close(w_w + w_l, torch.ones(2))
    with pytest.raises(ValueError, match="hard"):
        balance_weights(torch.ones(1), torch.ones(1), tau=1.0, weighting="hard")


def test_norm_scale_keeps_the_length_of_the_weight_vector():
    w_w = torch.tensor([0.5, 0.9, 1.0])
    s = scaling_factor(w_w, 1 - w_w, "norm")
    torch.testing.assert_close((s * w_w).square() + (s * (1 - w_w)).square(), torch.full((3,), 2.0))
    torch.testing.assert_close(s[[0, 2]], torch.tensor([2.0, math.sqrt(2.0)]))
    torch.testing.assert_close(scaling_factor(w_w, 1 - w_w, 2.0), torch.full((3,), 2.0))


def test_weights_need_no_policy():
    """They are known as soon as the pairs are scored."""
    pairs = make_pairs(requires_grad=False)
    known = Pairs(**{**vars(pairs), "policy_chosen": None, "policy_rejected": None})
    for loss in (BalancedDPOLoss(tau=0.25), DPOLoss()):
        for found, expected in zip(vars(loss.weights(known)).values(), vars(loss.weights(pairs)).values(), strict=True):
            assert torch.equal(found, expected)


def test_a_loss_of_the_form_before_is_refused_with_the_form_of_today():
    with pytest.raises(InputError, match=r"Old\.__call__ takes one argument.*policy_chosen, policy_rejected, scores"):

        class Old(PreferenceLoss):
            def __call__(self, pairs):
                return pairs.policy_chosen


def test_tau_auto_is_the_robust_spread_of_the_training_pairs_and_goes_on_from_a_checkpoint():
    pairs = make_pairs(B=999, requires_grad=False)
    loss, given = BalancedDPOLoss(tau="auto"), BalancedDPOLoss()
    with pytest.raises(ValueError, match="tau is auto"):
        loss.weights(pairs)
    for each in (loss, given, DPOLoss()):
        each.prepare(pairs)
    difference = (pairs.comprehension_chosen - pairs.comprehension_rejected).double()
    median = difference.sort().values[499]
    expected = 1.4826 * (difference - median).abs().sort().values[499]
    assert loss.temperature() == pytest.approx(expected.item(), rel=1e-6)
    # The draws are normal.
    assert loss.temperature() == pytest.approx(1.5 * math.sqrt(2), rel=0.1)
    assert loss.state_dict() == {"tau": loss.temperature()}
    assert given.state_dict() == DPOLoss().state_dict() == {}
    resumed = BalancedDPOLoss(tau="auto")
    resumed.load_state_dict(loss.state_dict())
    assert torch.equal(resumed.weights(pairs).chosen, loss.weights(pairs).chosen)
    with pytest.raises(InputError, match="written with a number"):
        resumed.load_state_dict({})


def test_tau_is_a_number_by_default_only_in_the_unit_that_the_trial_was_made_in():
    assert BalancedDPOLoss().temperature() == 0.25
    for make in (BalancedDPOLoss, partial(BalancedLoss, DPOLoss())):
        assert not make().needs_all_pairs
        assert all(make(estimator=each).needs_all_pairs for each in ("pmi_sum", "ifd", "hsic"))


@pytest.mark.parametrize(
    ("difference", "expected"),
    [
        # Median 2, deviations 0, 0, 1, 1 and 998.
        ([1.0, 2.0, 3.0, 1000.0, 2.0], 1.4826),
        # More than half of the pairs balanced: the standard deviation.
        ([0.0, 0.0, 0.0, 5.0], math.sqrt(75) / 4),
        # All imbalanced alike: a tenth of that.
        ([0.5, 0.5, 0.5], 0.05),
        ([-3.0, -3.0, -3.0, -3.001], 0.3),
        ([-0.5], 0.05),
        ([0.0, 0.0], 1.0),
    ],
)
def test_spread_by_hand(difference, expected):
    assert imbalance_spread(torch.tensor(difference), torch.zeros(())) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("last", "expected"), [(5.0, math.sqrt(75) / 4), (0.0, 1.0)])
def test_spread_is_not_that_of_rounding(last, expected):
    rejected = torch.full((4,), 0.7)
    chosen = rejected + torch.tensor([1e-7, -1e-7, 2e-7, last])
    assert imbalance_spread(chosen, rejected) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("weighting", "estimator"), [("softmax", "pmi"), ("ratio", "ifd")])
def test_ratio_of_the_weights_is_capped_and_gentle_pairs_keep_theirs(weighting, estimator):
    pairs = make_pairs(requires_grad=False)
    options = {"tau": 0.5, "weighting": weighting, "estimator": estimator}
    free = BalancedDPOLoss(**options).weights(pairs)
    capped = BalancedDPOLoss(**options, max_weight_ratio=4.0).weights(pairs)
    ratio = torch.maximum(free.chosen / free.rejected, free.rejected / free.chosen)
    assert 0 < (ratio > 4).sum() < len(ratio)
    found = torch.maximum(capped.chosen / capped.rejected, capped.rejected / capped.chosen)
    torch.testing.assert_close(found, ratio.clamp_max(4.0), rtol=1e-4, atol=0)
    torch.testing.assert_close(capped.chosen + capped.rejected, torch.ones_like(ratio))
    assert torch.equal((capped.chosen > 0.5), (free.chosen > 0.5))
