"""Comprehension measured on the policy as it learns."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from training import fit, same, weights

from bdpo_pl.errors import InputError
from bdpo_pl.losses import BalancedDPOLoss, DPOLoss

NAMES = [f"{split}/comprehension_{side}" for split in ("held_out", "train_probe") for side in ("chosen", "rejected")]


def no_learning(params):
    return torch.optim.SGD(params, lr=0.0)


@pytest.mark.parametrize("estimator", ["pmi", "hsic"])
def test_a_policy_that_does_not_learn_comprehends_as_its_reference(job, estimator):
    module = fit(job(loss=BalancedDPOLoss(estimator=estimator), reestimate_every=3, optimizer=no_learning))
    before, after = module.evaluations[0], module.evaluations[8]
    assert module.reestimation.state_dict()["step"] == 6
    assert set(module.reestimation.state_dict()["values"]) == {"train", "held_out", "train_probe"}
    assert [after[name] for name in NAMES] == pytest.approx([before[name] for name in NAMES], rel=1e-4)


def test_a_policy_that_learns_is_measured_anew(job):
    still = fit(job("still")).evaluations
    anew = fit(job("anew", reestimate_every=4)).evaluations
    for name in NAMES:
        assert still[8][name] == still[0][name] == anew[0][name]
        assert abs(anew[8][name] - anew[0][name]) > 1e-4


def test_accumulating_run_measures_once_a_step(job, monkeypatch):
    trainer, module, data = job(reestimate_every=2, data={"batch_size": 2}, trainer={"accumulate_grad_batches": 4})
    steps = []
    update = module.reestimation.update
    monkeypatch.setattr(module.reestimation, "update", lambda *a: (steps.append(module.global_step), update(*a)))
    trainer.fit(module, data)
    assert steps == [2]


def test_resumed_run_has_the_same_comprehension(job, tmp_path):
    whole = fit(job("whole", reestimate_every=3))
    keep = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=5, save_top_k=-1, filename="{step}")
    fit(job("keeping", reestimate_every=3, trainer={"callbacks": [keep]}))
    resumed = fit(job("resumed", reestimate_every=3), ckpt_path=str(tmp_path / "ckpt" / "step=5.ckpt"))
    assert same(weights(whole), weights(resumed))
    assert whole.evaluations[8] == resumed.evaluations[8]


@pytest.mark.parametrize(
    ("options", "fault"), [({"reestimate_every": 0}, "at least 1"), ({"loss": DPOLoss(), "reestimate_every": 5}, "DPO")]
)
def test_what_cannot_be_re_estimated_is_refused(job, options, fault):
    with pytest.raises(InputError, match=f"reestimate_every.*{fault}"):
        fit(job(**options))
