"""The baselines against their formulas in float64, numbers worked out by hand, TRL and Liger."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from baselines import LOSSES
from pairs import Pairs, pairs_of

from bdpo_kernels import linear_preference_loss
from bdpo_pl.errors import InputError
from bdpo_pl.losses import CPOLoss, DPOLoss, IPOLoss, PreferenceLoss, RMiPOLoss, SafeDPOLoss, SimPOLoss
from bdpo_pl.training.metrics import pair_metrics

pytestmark = pytest.mark.usefixtures("seeded")
B = 64


def make_pairs(seed=0) -> Pairs:
    g = torch.Generator().manual_seed(seed)

    def draw(scale, offset=0.0):
        return torch.randn(B, generator=g) * scale + offset

    policy = [draw(20.0, -60.0).requires_grad_() for _ in range(2)]
    lengths = [torch.randint(1, 60, (B,), generator=g) for _ in range(2)]
    rejected_safe = torch.rand(B, generator=g) < 0.5
    # In order: the chosen is safe.
    safe = [torch.ones(B, dtype=torch.bool), rejected_safe]
    return pairs_of(*policy, *lengths, draw(20.0, -60.0), draw(20.0, -60.0), draw(1.5), draw(1.5), *safe)


def softplus(x):
    return torch.logaddexp(torch.zeros_like(x), x)


def ipo(p, beta):
    return (
        (p.policy_chosen - p.reference_chosen) / p.chosen_length
        - (p.policy_rejected - p.reference_rejected) / p.rejected_length
        - 1 / (2 * beta)
    ) ** 2


def cpo(p, beta, alpha, tokens):
    preference = softplus(-beta * (p.policy_chosen - p.policy_rejected))
    return preference - alpha * p.policy_chosen / tokens(p)


def simpo(p, beta, gamma):
    z = beta * p.policy_chosen / p.chosen_length - beta * p.policy_rejected / p.rejected_length - gamma
    return softplus(-z)


def safe_dpo(p, beta, delta):
    h_w, h_l = 1 - p.chosen_safe, 1 - p.rejected_safe
    d_w, d_l = p.policy_chosen - p.reference_chosen, p.policy_rejected - p.reference_rejected
    return softplus(-(beta * (d_w - d_l) - (h_l - h_w) * delta))


def rmipo(p, beta, floor, spread):
    lead = p.comprehension_chosen - p.comprehension_rejected
    return simpo(p, beta, beta * (floor + spread * torch.exp(-torch.where(lead > 0, lead, 0.0))))


@pytest.mark.parametrize(
    ("loss", "formula"),
    [
        (IPOLoss(), lambda p: ipo(p, 0.1)),
        (IPOLoss(0.7), lambda p: ipo(p, 0.7)),
        (CPOLoss(), lambda p: cpo(p, 0.1, 1.0, lambda p: p.chosen_length)),
        (CPOLoss(0.3, 0.5, "sum"), lambda p: cpo(p, 0.3, 0.5, lambda p: 1.0)),
        (CPOLoss(alpha=0.0), lambda p: cpo(p, 0.1, 0.0, lambda p: 1.0)),
        (SimPOLoss(), lambda p: simpo(p, 2.5, 0.25)),
        (SimPOLoss(10.0, 0.3), lambda p: simpo(p, 10.0, 3.0)),
        (SafeDPOLoss(), lambda p: safe_dpo(p, 0.1, 10.0)),
        (SafeDPOLoss(0.4, 3.0), lambda p: safe_dpo(p, 0.4, 3.0)),
        (RMiPOLoss(), lambda p: rmipo(p, 2.0, 0.3, 1.3)),
        (RMiPOLoss(1.0, 0.1, 2.0), lambda p: rmipo(p, 1.0, 0.1, 2.0)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, PreferenceLoss) else "",
)
def test_values_and_gradients_are_the_formulas(loss, formula):
    pairs = make_pairs()
    # Leaves of their own, in float64.
    exact = SimpleNamespace(
        **{name: tensor.detach().double() for name, tensor in vars(pairs).items() if tensor is not None}
    )
    exact.policy_chosen.requires_grad_()
    exact.policy_rejected.requires_grad_()
    losses, expected = pairs.under(loss), formula(exact)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), expected, rtol=1e-4, atol=1e-4)
    losses.sum().backward()
    expected.sum().backward()
    for name in ("policy_chosen", "policy_rejected"):
        grad, other = getattr(pairs, name).grad, getattr(exact, name).grad
        torch.testing.assert_close(grad.double(), other, rtol=1e-4, atol=1e-6, msg=name)


def one_pair(chosen, rejected, lengths=(1, 1), reference=(0.0, 0.0), comprehension=None, safe=None):
    """A pair of the numbers given."""
    numbers = [torch.tensor([float(x)]) for x in (chosen, rejected, *lengths, *reference, *(comprehension or (0, 0)))]
    flags = [torch.tensor([x]) for x in safe or (True, True)]
    return pairs_of(*numbers, *flags)


def test_safe_dpo_by_hand():
    # D_w = 5, D_l = −10, so β[D_w − D_l] = 1.5, and 10 less where the rejected response is unsafe.
    safe = one_pair(-20, -40, reference=(-25, -30), safe=(True, True))
    unsafe = one_pair(-20, -40, reference=(-25, -30), safe=(True, False))
    assert safe.under(SafeDPOLoss()).item() == pytest.approx(0.2014133, rel=1e-6)
    assert unsafe.under(SafeDPOLoss()).item() == pytest.approx(8.5002034, rel=1e-6)
    assert torch.equal(safe.under(SafeDPOLoss()), safe.under(DPOLoss()))


@pytest.mark.parametrize(
    ("comprehension", "expected"),
    [
        # ℓ̄_w − ℓ̄_l = 1. A lead of ln 2 gives γ = 0.3 + 0.65, so z = 2·0.05; no lead γ = 1.6, so z = −1.2.
        ((1 + math.log(2), 1), math.log(1 + math.exp(-0.1))),
        ((1, 1), math.log(1 + math.exp(1.2))),
        ((-3, 1), math.log(1 + math.exp(1.2))),
        ((50, 0), math.log(1 + math.exp(-1.4))),
    ],
)
def test_rmipo_by_hand(comprehension, expected):
    pairs = one_pair(-4, -15, lengths=(2, 5), comprehension=comprehension)
    assert pairs.under(RMiPOLoss()).item() == pytest.approx(expected, rel=1e-6)


def test_only_ipo_begins_with_a_value_of_its_own():
    """Where policy and reference are one model."""
    pairs = make_pairs()
    same = Pairs(
        **{**vars(pairs), "reference_chosen": pairs.policy_chosen, "reference_rejected": pairs.policy_rejected}
    )
    for loss in (IPOLoss(), IPOLoss(0.4)):
        losses = same.under(loss)
        torch.testing.assert_close(losses, torch.full_like(losses, loss.initial_value))
    assert IPOLoss().initial_value == pytest.approx(25.0)
    assert [loss().initial_value for loss in LOSSES[1:]] == [None] * 4


@pytest.mark.parametrize(
    ("loss", "arguments", "named"),
    [
        *((loss, {"beta": bad}, "beta") for loss in LOSSES for bad in (0.0, -1.0, float("nan"), float("inf"))),
        (CPOLoss, {"alpha": -0.1}, "alpha"),
        (CPOLoss, {"nll": "median"}, "median"),
        (SimPOLoss, {"gamma_beta_ratio": -1.0}, "gamma_beta_ratio"),
        (SafeDPOLoss, {"delta": float("nan")}, "delta"),
        (RMiPOLoss, {"gamma_floor": -1.0}, "gamma_floor"),
        (RMiPOLoss, {"gamma_range": -1.0}, "gamma_range"),
    ],
)
def test_bad_arguments_are_named(loss, arguments, named):
    with pytest.raises(InputError, match=named):
        loss(**arguments)


@pytest.mark.parametrize(
    ("loss", "missing"),
    [(IPOLoss, "reference"), (SafeDPOLoss, "reference"), (SafeDPOLoss, "safe"), (RMiPOLoss, "comprehension")],
)
def test_what_is_missing_is_an_error(loss, missing):
    pairs = {name: tensor for name, tensor in vars(make_pairs()).items() if missing not in name}
    with pytest.raises(ValueError, match=missing):
        Pairs(**pairs).under(loss())


# Peers


def trl_trainer(kind, **attributes):
    """A trainer of TRL's as far as its loss is concerned."""
    trainer = object.__new__(kind)
    same = lambda tensor: tensor  # noqa: E731
    trainer.accelerator = SimpleNamespace(device="cpu", gather=same, gather_for_metrics=same)
    trainer.aux_loss_enabled = False
    for name, value in attributes.items():
        setattr(trainer, name, value)
    return trainer


def test_ipo_is_trls():
    dpo_trainer = pytest.importorskip("trl.trainer.dpo_trainer")
    lengths = torch.tensor([3, 7, 5, 2])
    mask = (torch.arange(8) > 0) & (torch.arange(8) <= lengths[:, None])
    logps = (torch.randn(4, 7) * mask[:, 1:]).requires_grad_()
    reference = torch.randn(4)

    def model(**_):
        return SimpleNamespace(log_probs=logps, entropy=logps, mean_logits=logps, is_top1=mask[:, 1:])

    trainer = trl_trainer(
        dpo_trainer.DPOTrainer, model=SimpleNamespace(training=True), ld_alpha=None, precompute_ref_logps=True,
        f_divergence_type="reverse_kl", loss_types=["ipo"], loss_weights=[1.0], beta=0.3, label_smoothing=0.0,
        use_weighting=False, _metrics={"train": defaultdict(list)}, _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    inputs = {
        "input_ids": torch.ones(4, 8, dtype=torch.int64),
        "attention_mask": torch.ones(4, 8, dtype=torch.int64),
        "completion_mask": mask.long(),
        "ref_chosen_logps": reference[:2],
        "ref_rejected_logps": reference[2:],
    }
    theirs = trainer._compute_loss(model, inputs, return_outputs=False)
    loss, sums = IPOLoss(0.3), logps.sum(1)
    pairs = pairs_of(*sums.split(2), *lengths.split(2), *reference.split(2))
    ours = pairs.under(loss).mean()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, logps)[0], torch.autograd.grad(theirs, logps)[0])
    margin = pair_metrics(loss, torch.stack(pairs.policy), pairs, ours)["margin"].mean().item()
    assert margin == pytest.approx(trainer._metrics["train"]["rewards/margins"][0])


@pytest.mark.parametrize("lengths", [[5, 5, 3, 6], [7, 2, 6, 4]], ids=["chosen equally long", "of any length"])
@pytest.mark.parametrize(
    ("loss", "theirs"),
    [
        (CPOLoss(0.2, alpha=0.7), {"loss_type": "sigmoid", "beta": 0.2, "cpo_alpha": 0.7}),
        (CPOLoss(0.2, alpha=0.0), {"loss_type": "sigmoid", "beta": 0.2, "cpo_alpha": 0.0}),
        (SimPOLoss(2.0, 0.3), {"loss_type": "simpo", "beta": 2.0, "cpo_alpha": 0.0, "simpo_gamma": 0.6}),
    ],
    ids=["CPO", "CPO without NLL", "SimPO"],
)
def test_cpo_and_simpo_are_trls(loss, theirs, lengths):
    module = pytest.importorskip("trl.experimental.cpo.cpo_trainer")
    T, V = 9, 11
    mask = (torch.arange(T) > 0) & (torch.arange(T) <= torch.tensor(lengths)[:, None])
    labels = torch.randint(V, (4, T)).masked_fill(~mask, -100)
    logits = torch.randn(4, T, V, requires_grad=True)
    trainer = trl_trainer(
        module.CPOTrainer, alpha=0.0, label_smoothing=0.0, is_encoder_decoder=False, pad_token_id=0, **theirs
    )
    ids = labels.clamp_min(0)
    batch = {}
    for name, rows in (("chosen", slice(0, 2)), ("rejected", slice(2, 4))):
        batch |= {f"{name}_input_ids": ids[rows], f"{name}_attention_mask": torch.ones_like(ids[rows])}
        batch[f"{name}_labels"] = labels[rows]
    expected, metrics = trainer.get_batch_loss_metrics(lambda *_, **__: SimpleNamespace(logits=logits), batch)

    token_logps = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2) * mask[:, 1:]
    pairs = pairs_of(*token_logps.sum(1).split(2), *mask.sum(1).split(2))
    ours = pairs.under(loss).mean()
    if isinstance(loss, CPOLoss) and loss.alpha and lengths[0] != lengths[1]:
        # TRL weighs each pair's mean NLL by its length: the one deviation, made good by hand.
        nll, tokens = -token_logps[:2].sum(1), mask[:2].sum(1)
        ours = ours - loss.alpha * (nll / tokens).mean() + loss.alpha * nll.sum() / tokens.sum()
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    grads = [torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (ours, expected)]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)
    logged = pair_metrics(loss, torch.stack(pairs.policy), pairs, ours)
    for name, other in (("margin", "margins"), ("reward_chosen", "chosen"), ("reward_rejected", "rejected")):
        assert logged[name].mean().item() == pytest.approx(metrics[f"rewards/{other}"], rel=1e-5)


@pytest.mark.parametrize("name", ["CPO", "SimPO"])
def test_fused_cpo_and_simpo_are_ligers(name):
    chunked = pytest.importorskip("liger_kernel.chunked_loss")
    T, D, V = 6, 16, 40
    hidden, weight, labels = torch.randn(6, T, D), torch.randn(V, D) / 4, torch.randint(V, (6, T))
    # The chosen equally long, as Liger's NLL needs to be ours.
    labels[:3, 5:] = labels[4, 2:] = -100
    lengths = (labels != -100).sum(1)
    if name == "CPO":
        loss = CPOLoss(0.2, alpha=0.7)
        peer = chunked.LigerFusedLinearCPOLoss(beta=0.2, alpha=0.7, compiled=False)
    else:
        loss = SimPOLoss(2.0, 0.3)
        peer = chunked.LigerFusedLinearSimPOLoss(beta=2.0, gamma=0.6, compute_nll_loss=False, compiled=False)

    def of_pairs(chosen, rejected, index):
        return pairs_of(chosen, rejected, lengths[:3][index], lengths[3:][index]).under(loss) / 3

    results = []
    for run in ("ours", "peer"):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if run == "ours":
            ids = torch.arange(6).repeat_interleave(T)
            value, *_ = linear_preference_loss(h.flatten(0, 1), w, labels.flatten(), ids, of_pairs, num_pairs=3)
        else:
            value = peer(w, h, labels)[0]
        results.append((value, *torch.autograd.grad(value, (h, w))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
