"""Further objectives against their formulas in float64, TRL's own numbers, and in training."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from makers import preference_rows, write_jsonl
from pairs import Pairs, pairs_of
from training import fit, sgd, weights
from transformers import AutoModelForCausalLM

from bdpo_pl.errors import InputError
from bdpo_pl.losses import (
    AdaDPOLoss,
    APODownLoss,
    APOZeroLoss,
    BalancedDPOLoss,
    BalancedLoss,
    BSOLoss,
    CPOLoss,
    DPOLoss,
    DrDPOLoss,
    HingeLoss,
    IPOLoss,
    RobustDPOLoss,
    SafeDPOLoss,
    SFTLoss,
    SigmoidNormLoss,
    WeightedSum,
    WPOLoss,
)

B = 32


def make_pairs(seed=0, spread=8.0) -> Pairs:
    g = torch.Generator().manual_seed(seed)

    def draw(scale, offset=0.0):
        return torch.randn(B, generator=g) * scale + offset

    reference = [draw(20.0, -60.0) for _ in range(2)]
    policy = [(r + draw(spread)).clamp_max(-1.0).requires_grad_() for r in reference]
    lengths = [torch.randint(1, 60, (B,), generator=g) for _ in range(2)]
    safe = [torch.ones(B, dtype=torch.bool), torch.rand(B, generator=g) < 0.5]
    return pairs_of(*policy, *lengths, *reference, draw(0.8), draw(0.8), *safe)


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def nls(z):
    return torch.logaddexp(torch.zeros_like(z), -z)


def ratios(p):
    return p.policy_chosen - p.reference_chosen, p.policy_rejected - p.reference_rejected


def margin(p):
    d_w, d_l = ratios(p)
    return d_w - d_l


def ada(p, beta, C):
    factor = torch.exp(p.policy_chosen / p.chosen_length - p.policy_rejected / p.rejected_length).detach()
    d_w, d_l = ratios(p)
    return nls(beta * factor.clip(1 / C, C) * d_w - beta * d_l)


def bso(p, generator):
    log_ratio = -(0.1 * margin(p) - 30 * (p.chosen_safe - p.rejected_safe))
    if generator == "logistic":
        return nls(-log_ratio)
    within = log_ratio.clip(-30, 30)
    R = torch.exp(within)
    # The derivative by log R goes on as it is at the end.
    return (0.2 * R**1.2 - 1.2 * R**-0.2 + 1) / (4 * 0.2 * 1.2) + (R**1.2 + R**-0.2) / 4 * (log_ratio - within)


def balanced(p, tau=0.5):
    d_w, d_l = ratios(p)
    w = sigmoid(-(p.comprehension_chosen - p.comprehension_rejected) / tau)
    return 2 * w * d_w, 2 * (1 - w) * d_l


def dr(p, beta_prime):
    return (-beta_prime * torch.log(torch.exp(-nls(0.1 * margin(p)) / beta_prime).mean())).expand(B)


FORMULAS = {
    "hinge": (HingeLoss(0.2), lambda p: torch.relu(1 - 0.2 * margin(p))),
    "sigmoid_norm": (SigmoidNormLoss(3.0), lambda p: nls(
        3 * (ratios(p)[0] / p.chosen_length - ratios(p)[1] / p.rejected_length))),
    "robust": (RobustDPOLoss(0.1, 0.2), lambda p: (0.8 * nls(0.1 * margin(p)) - 0.2 * nls(-0.1 * margin(p))) / 0.6),
    "apo_zero": (APOZeroLoss(), lambda p: 1 - sigmoid(0.1 * ratios(p)[0]) + sigmoid(0.1 * ratios(p)[1])),
    "apo_down": (APODownLoss(), lambda p: sigmoid(0.1 * ratios(p)[0]) + 1 - sigmoid(0.1 * margin(p))),
    "ada": (AdaDPOLoss(), lambda p: ada(p, 0.1, 2.0)),
    "dr": (DrDPOLoss(0.1, 0.5), lambda p: dr(p, 0.5)),
    "bso": (BSOLoss(), lambda p: bso(p, "basu")),
    "bso logistic": (BSOLoss(generator="logistic"), lambda p: bso(p, "logistic")),
    "rpo": (DPOLoss(sft_weight=0.7), lambda p: nls(0.1 * margin(p)) - 0.7 * p.policy_chosen / p.chosen_length),
    "balanced rpo": (
        BalancedDPOLoss(tau=0.5, sft_weight=0.7),
        lambda p: nls(0.1 * (balanced(p)[0] - balanced(p)[1])) - 0.7 * p.policy_chosen / p.chosen_length,
    ),
    "balanced hinge": (
        BalancedLoss(HingeLoss(0.2), tau=0.5),
        lambda p: torch.relu(1 - 0.2 * (balanced(p)[0] - balanced(p)[1])),
    ),
    "balanced apo": (
        BalancedLoss(APOZeroLoss(), tau=0.5),
        lambda p: 1 - sigmoid(0.1 * balanced(p)[0]) + sigmoid(0.1 * balanced(p)[1]),
    ),
    "mixture": (
        WeightedSum([DPOLoss(), SFTLoss(), HingeLoss()], [0.8, 0.5, 0.1]),
        lambda p: 0.8 * nls(0.1 * margin(p)) - 0.5 * p.policy_chosen / p.chosen_length
        + 0.1 * torch.relu(1 - 0.1 * margin(p)),
    ),
    "wpo": (WPOLoss(DPOLoss()), lambda p: nls(0.1 * margin(p)) * torch.exp(
        p.policy_chosen / p.chosen_length + p.policy_rejected / p.rejected_length).detach().clip(max=1)),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMULAS)
def test_values_and_gradients_are_the_formulas(name):
    loss, formula = FORMULAS[name]
    pairs = make_pairs()
    exact = SimpleNamespace(**{k: t.detach().double() for k, t in vars(pairs).items() if t is not None})
    exact.policy_chosen.requires_grad_()
    exact.policy_rejected.requires_grad_()
    losses, expected = pairs.under(loss), formula(exact)
    assert losses.dtype == torch.float32
    assert losses.shape == (B,)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-4, atol=1e-5)
    losses.sum().backward()
    expected.sum().backward()
    for side in ("policy_chosen", "policy_rejected"):
        grad, other = getattr(pairs, side).grad, getattr(exact, side).grad
        torch.testing.assert_close(grad.double(), other, rtol=1e-3, atol=1e-6, msg=side)


@pytest.mark.parametrize("loss", [HingeLoss(), RobustDPOLoss(), APOZeroLoss(), APODownLoss(), AdaDPOLoss(), DrDPOLoss(),
                                  SigmoidNormLoss(), BalancedLoss(HingeLoss(), tau=1.0),
                                  WeightedSum([DPOLoss(), HingeLoss()], [1.0, 0.5])])  # fmt: skip
def test_first_loss_is_as_the_loss_says(loss):
    pairs = make_pairs()
    same = Pairs(
        **{**vars(pairs), "policy_chosen": pairs.reference_chosen, "policy_rejected": pairs.reference_rejected}
    )
    losses = same.under(loss)
    torch.testing.assert_close(losses, torch.full((B,), loss.initial_value))


def test_sft_leaves_no_first_loss_to_check():
    assert DPOLoss(sft_weight=0.1).initial_value is None
    assert HingeLoss(sft_weight=0.1).initial_value is None


def test_balanced_dpo_is_dpo_under_balance_weights():
    for options in ({"tau": 0.4}, {"tau": 0.4, "scale": "norm", "max_weight_ratio": 3.0}):
        a, b = make_pairs(), make_pairs()
        wrapped, own = a.under(BalancedLoss(DPOLoss(0.2), **options)), b.under(BalancedDPOLoss(0.2, **options))
        torch.testing.assert_close(wrapped, own, rtol=1e-5, atol=1e-6)
        wrapped.sum().backward()
        own.sum().backward()
        torch.testing.assert_close(a.policy_chosen.grad, b.policy_chosen.grad, rtol=1e-4, atol=1e-7)


def test_a_sum_of_losses_has_balance_weights_as_each_of_them():
    pairs, parts = make_pairs(), [DPOLoss(0.2), HingeLoss(0.3)]
    whole = pairs.under(BalancedLoss(WeightedSum(parts, [0.5, 2.0]), 0.4))
    single = [pairs.under(BalancedLoss(part, 0.4)) for part in parts]
    torch.testing.assert_close(whole, 0.5 * single[0] + 2.0 * single[1])


def test_bso_by_the_logistic_generator_is_safe_dpo():
    pairs = make_pairs()
    torch.testing.assert_close(
        pairs.under(BSOLoss(margin=10.0, generator="logistic")), pairs.under(SafeDPOLoss()), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("lam", [0.2, 1.0, 5.0])
@pytest.mark.parametrize("unsafe", ["rejected", "both"])
def test_bso_corrects_pairs_that_drift_the_wrong_way(unsafe, lam):
    """At the default margin log R is 30 at the start: beyond its bound a gradient of 0 would leave them there."""
    safe = torch.full((5,), unsafe == "rejected")
    margins = torch.tensor([-500.0, -20.0, -0.01, 0.01, 20.0])
    policy = (-60.0 + margins).requires_grad_()
    start = torch.full((5,), -60.0)
    lengths = torch.full((5,), 9)
    zeros = torch.zeros(5)
    pairs = pairs_of(
        policy, start, lengths, lengths, start, start, zeros, zeros, safe, torch.zeros(5, dtype=torch.bool)
    )
    values = pairs.under(BSOLoss(lam=lam))
    values.sum().backward()
    assert torch.isfinite(values).all()
    assert (values[:-1] > values[1:]).all()
    assert torch.isfinite(policy.grad).all()
    assert (policy.grad < 0).all()
    if unsafe == "rejected":
        # No pair is pulled less than one that is further ahead.
        assert (policy.grad[:-1] <= policy.grad[1:]).all()


def test_dr_dpo_leaves_out_pairs_that_only_fill_a_batch_and_is_dpo_for_a_large_beta_prime():
    pairs = make_pairs()
    counted = torch.arange(B) % 3 > 0
    some = Pairs(**{**vars(pairs), "counted": counted})
    kept = {name: tensor[counted] for name, tensor in vars(pairs).items() if tensor is not None}
    torch.testing.assert_close(some.under(DrDPOLoss())[0], Pairs(**kept).under(DrDPOLoss())[0])
    for large in (1e4, 1e8, 1e30):
        found = pairs.under(DrDPOLoss(beta_prime=large))[0]
        torch.testing.assert_close(found, pairs.under(DPOLoss()).mean(), rtol=1e-3 if large == 1e4 else 1e-6, atol=0)
    nothing = Pairs(**{**vars(pairs), "counted": torch.zeros(B, dtype=torch.bool)}).under(DrDPOLoss())
    assert torch.equal(nothing, torch.zeros(B))


def test_tau_of_a_part_is_found_kept_and_taken_up():
    pairs = make_pairs()
    for make in (
        lambda: BalancedLoss(HingeLoss(), "auto"),
        lambda: WeightedSum([SFTLoss(), BalancedDPOLoss(tau="auto")]),
    ):
        loss, again = make(), make()
        assert loss.needs_all_pairs
        assert loss.needs_comprehension
        loss.prepare(pairs)
        again.load_state_dict(loss.state_dict())
        assert torch.equal(again.weights(pairs).chosen, loss.weights(pairs).chosen)
        assert torch.equal(pairs.under(again), pairs.under(loss))


class Shifted(DPOLoss):
    """Measures the mean log-probability of the chosen responses under the reference."""

    needs_all_pairs = True
    mean: float | None = None

    def prepare(self, scores):
        self.mean = scores.reference_chosen.mean().item()

    def state_dict(self):
        return {} if self.mean is None else {"mean": self.mean}

    def load_state_dict(self, state):
        self.mean = state.get("mean")


@pytest.mark.parametrize("tau", ["auto", 0.4])
def test_the_loss_under_balance_weights_is_prepared_too(tau):
    pairs = make_pairs()
    loss, again, before = (BalancedLoss(Shifted(), tau) for _ in range(3))
    loss.prepare(pairs)
    again.load_state_dict(loss.state_dict())
    assert again._loss.mean == pairs.reference_chosen.mean().item()
    assert again.state_dict() == loss.state_dict()
    # In checkpoints of earlier versions.
    before.load_state_dict({name: value for name, value in loss.state_dict().items() if name == "tau"})
    assert before._loss.mean is None


@pytest.mark.parametrize(
    ("make", "fault"),
    [
        (lambda: BalancedLoss(CPOLoss()), "more of the policy than its two log-ratios"),
        (lambda: BalancedLoss(DPOLoss(sft_weight=1.0)), "WeightedSum"),
        (lambda: BalancedLoss(BalancedDPOLoss()), "more of the policy than its two log-ratios"),
        (lambda: WeightedSum([]), "0 losses"),
        (lambda: WeightedSum([DPOLoss()], [1.0, 2.0]), "1 losses and 2 weights"),
        (lambda: WeightedSum([BalancedDPOLoss(), BalancedDPOLoss(estimator="hsic")]), "different estimators"),
        (lambda: RobustDPOLoss(epsilon=0.5), "epsilon"),
        (lambda: DrDPOLoss(beta_prime=0.0), "beta_prime"),
        (lambda: AdaDPOLoss(clip=0.5), "clip"),
        (lambda: BSOLoss(generator="mine"), "generator"),
        (lambda: IPOLoss(beta=0.0), "beta"),
        (lambda: DPOLoss(sft_weight=-1.0), "sft_weight"),
    ],
)
def test_what_does_not_fit_is_refused(make, fault):
    with pytest.raises(InputError, match=fault):
        make()


# Peers


@pytest.mark.parametrize(
    ("loss", "theirs"),
    [
        (HingeLoss(0.3), {"loss_types": ["hinge"]}),
        (RobustDPOLoss(0.3, 0.2), {"loss_types": ["robust"], "label_smoothing": 0.2}),
        (APOZeroLoss(0.3), {"loss_types": ["apo_zero"]}),
        (APODownLoss(0.3), {"loss_types": ["apo_down"]}),
        (SigmoidNormLoss(0.3), {"loss_types": ["sigmoid_norm"]}),
        (
            WeightedSum([DPOLoss(0.3), SFTLoss()], [0.8, 0.4]),
            {"loss_types": ["sigmoid", "sft"], "loss_weights": [0.8, 0.4]},
        ),
    ],
    ids=["hinge", "robust", "apo_zero", "apo_down", "sigmoid_norm", "sigmoid + sft"],
)  # fmt: skip
def test_values_and_gradients_are_trls(loss, theirs):
    dpo_trainer = pytest.importorskip("trl.trainer.dpo_trainer")
    torch.manual_seed(0)
    # The chosen equally long, as TRL's mean NLL needs to be ours.
    lengths = torch.tensor([5, 5, 3, 7])
    mask = (torch.arange(8) > 0) & (torch.arange(8) <= lengths[:, None])
    leaf = torch.randn(4, 7, requires_grad=True)
    logps = leaf * mask[:, 1:]
    reference = torch.randn(4)

    def model(**_):
        return SimpleNamespace(log_probs=logps, entropy=logps, mean_logits=logps, is_top1=mask[:, 1:])

    trainer = object.__new__(dpo_trainer.DPOTrainer)
    same = lambda tensor: tensor  # noqa: E731
    attributes = {
        "accelerator": SimpleNamespace(device="cpu", gather=same, gather_for_metrics=same), "aux_loss_enabled": False,
        "model": SimpleNamespace(training=True), "ld_alpha": None, "precompute_ref_logps": True,
        "f_divergence_type": "reverse_kl", "loss_weights": [1.0], "beta": 0.3, "label_smoothing": 0.0,
        "use_weighting": False, "_metrics": {"train": defaultdict(list)}, "_total_train_tokens": 0, "_tp_size": 1,
    }  # fmt: skip
    for name, value in {**attributes, **theirs}.items():
        setattr(trainer, name, value)
    inputs = {
        "input_ids": torch.ones(4, 8, dtype=torch.int64),
        "attention_mask": torch.ones(4, 8, dtype=torch.int64),
        "completion_mask": mask.long(),
        "ref_chosen_logps": reference[:2],
        "ref_rejected_logps": reference[2:],
    }
    expected = trainer._compute_loss(model, inputs, return_outputs=False)
    ours = pairs_of(*logps.sum(1).split(2), *lengths.split(2), *reference.split(2)).under(loss).mean()
    torch.testing.assert_close(ours, expected)
    grads = [torch.autograd.grad(value, leaf, retain_graph=True)[0] for value in (ours, expected)]
    torch.testing.assert_close(*grads)


# In training


@pytest.mark.parametrize(
    "make",
    [
        lambda: BalancedLoss(APOZeroLoss()),
        lambda: WeightedSum([BSOLoss(), WPOLoss(AdaDPOLoss())], [0.01, 1.0]),
        lambda: BalancedDPOLoss(sft_weight=0.2),
    ],
)
def test_fused_and_shared_train_as_logits_and_rows_of_their_own(job, model_dir, tmp_path, make):
    rows = [{**row, "chosen_safe": True, "rejected_safe": i % 3 > 0} for i, row in enumerate(preference_rows(40))]
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    trainer = {"max_steps": 2, "num_sanity_val_steps": 0, "limit_val_batches": 0}

    def trained(name, **layout):
        return weights(fit(job(name, trainer=dict(trainer), loss=make(), optimizer=sgd, **layout)))

    fused = trained("fused", lm_head="fused", prefix_sharing="always")
    plain = trained("plain", lm_head="logits", prefix_sharing="never")
    before = dict(AutoModelForCausalLM.from_pretrained(model_dir).named_parameters())
    assert max((value - before[name]).abs().max() for name, value in plain.items()) > 1e-3
    for name, value in fused.items():
        torch.testing.assert_close(value, plain[name], rtol=1e-5, atol=1e-6, msg=name)


def test_a_loss_that_mixes_pairs_runs_on_logits_or_says_why_not(job, caplog):
    trainer = {"max_steps": 2, "num_sanity_val_steps": 0, "limit_val_batches": 0}
    module = fit(job("dr", trainer=dict(trainer), loss=DrDPOLoss()))
    assert "not fused: the loss of a pair depends on the others of its batch" in caplog.text
    assert math.isfinite(float(module.trainer.callback_metrics["train/loss"]))
    with pytest.raises(InputError, match="depends on the others of its batch"):
        fit(job("refused", trainer=dict(trainer), loss=DrDPOLoss(), lm_head="fused"))
