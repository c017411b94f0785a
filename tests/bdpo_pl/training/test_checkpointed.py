"""What a resumed run takes out of its checkpoint, and what it must not."""

import logging
import warnings

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from makers import preference_rows, write_jsonl
from training import fit

from bdpo_pl.data.packing import RowLayout
from bdpo_pl.errors import InputError
from bdpo_pl.forward import prefix_sharing
from bdpo_pl.losses import BalancedDPOLoss, DPOLoss
from bdpo_pl.losses.balanced_dpo import imbalance_spread
from bdpo_pl.scoring.reference_sync import SyncOptions
from bdpo_pl.training.identity import RunIdentity
from bdpo_pl.training.schedule_free import ScheduleFreeAdamW

ROWS = preference_rows(60)[40:]


@pytest.fixture
def begun(job, tmp_path):
    """The checkpoint of a run of three steps."""

    def run(**options):
        keep = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=3, save_top_k=-1, filename="{step}")
        fit(job("begun", trainer={"max_steps": 3, "num_sanity_val_steps": 0, "callbacks": [keep]}, **options))
        return str(tmp_path / "ckpt" / "step=3.ckpt")

    return run


def at_once(job, checkpoint, **options):
    """The module of a run that is resumed from `checkpoint` and takes no step."""
    trainer = {"max_steps": 3, "num_sanity_val_steps": 0, "callbacks": options.pop("callbacks", [])}
    return fit(job("resumed", trainer=trainer, **options), ckpt_path=checkpoint)


def test_comprehension_under_the_policy_is_taken_up_for_the_pairs_it_was_measured_on(job, begun, tmp_path, caplog):
    checkpoint = begun(reestimate_every=2, data={"held_out": str(write_jsonl(tmp_path / "held.jsonl", ROWS[:8]))})
    held_out = {"held_out": str(tmp_path / "held.jsonl"), "seed": 1}
    # Of the same pairs, but another sample of them is the probe.
    with caplog.at_level(logging.INFO):
        resumed = at_once(job, checkpoint, reestimate_every=2, data=held_out)
    assert resumed.reestimation.state_dict()["values"].keys() == {"train", "held_out"}
    assert "under the policy is of other pairs (train_probe)" in caplog.text
    write_jsonl(tmp_path / "pairs.jsonl", preference_rows(40)[::-1])
    other = at_once(job, checkpoint, reestimate_every=2, data=held_out)
    assert other.reestimation.state_dict()["values"].keys() == {"held_out"}


def test_a_resumed_run_reads_rows_as_the_run_before_did(job, begun, monkeypatch):
    """Other weights, or another day's clock, could make a trial choose another layout, and other last bits."""
    monkeypatch.setattr(prefix_sharing, "_PAYS", 0.0)
    checkpoint = begun()
    monkeypatch.setattr(prefix_sharing, "_PAYS", float("inf"))
    resumed = at_once(job, checkpoint)
    assert resumed.row_layout is RowLayout.UNPADDED
    assert resumed.policy.config._attn_implementation == "bdpo_documents"
    # What the user asks for since then is tried again.
    for options in ({"prefix_sharing": "always"}, {"attn_implementation": "sdpa"}):
        assert at_once(job, checkpoint, **options).row_layout is RowLayout.SHARED
    assert at_once(job, checkpoint, prefix_sharing="never").row_layout is RowLayout.SPLIT


def test_a_second_fit_goes_on_with_its_pairs_and_refuses_others(job, tmp_path):
    trainer = {"max_steps": 1, "num_sanity_val_steps": 0, "limit_val_batches": 0}
    module = fit(job(trainer=dict(trainer), reestimate_every=1))
    module.reestimation.load_state_dict({"step": 8, "values": {}})
    again, _, data = job(trainer=trainer | {"max_steps": 2})
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*first loss.*")
        again.fit(module, data)
    # The steps of a fit are counted from its beginning.
    assert module.reestimation.state_dict()["step"] == 1
    write_jsonl(tmp_path / "pairs.jsonl", ROWS)
    other, _, data = job(trainer=dict(trainer))
    with pytest.raises(InputError, match=r"these are others \(train, held_out, train_probe\): make a new"):
        other.fit(module, data)


def auto(estimator, **options):
    return BalancedDPOLoss(tau="auto", estimator=estimator, **options)


@pytest.mark.parametrize("version", ["of now", "without its own estimator"])
def test_another_estimator_has_its_own_tau_and_comprehension(job, begun, caplog, version):
    path = begun(loss=auto("pmi_sum"), reestimate_every=2)
    saved = torch.load(path, weights_only=True)
    if version != "of now":
        del saved["bdpo_pl"]["estimator"]
        saved["bdpo_pl_run"] = {"traits": {"loss.estimator": {"value": "pmi_sum", "shown": "pmi_sum"}}}
        torch.save(saved, path)
    with caplog.at_level(logging.INFO):
        resumed = at_once(job, path, loss=auto("ifd"), reestimate_every=2)
    chosen, rejected = resumed.reference.scores("train", torch.arange(32)).comprehension
    tau = imbalance_spread(chosen, rejected)
    assert resumed.loss.temperature() == pytest.approx(tau)
    assert saved["bdpo_pl"]["loss"]["tau"] > 10 * tau
    assert resumed.reestimation.state_dict() == {"step": 2, "values": {}}
    assert f"not taken from the checkpoint, whose estimator is pmi_sum; by ifd: tau {tau:.4g}" in caplog.text
    assert "under the policy is by the estimator pmi_sum (held_out, train, train_probe); until it is" in caplog.text


@pytest.mark.parametrize(("loss", "was"), [(BalancedDPOLoss(estimator="pmi"), "pmi"), (DPOLoss(), "none")])
def test_tau_is_measured_where_the_checkpoint_has_none_of_the_estimator(job, begun, caplog, loss, was):
    checkpoint = begun(loss=loss)
    with caplog.at_level(logging.INFO):
        resumed = at_once(job, checkpoint, loss=auto("ifd"))
    assert f"whose estimator is {was}; by ifd: tau {resumed.loss.temperature():.4g}" in caplog.text


class OnDevice:
    """A whole weight in the memory of a device."""

    def __init__(self, value):
        self.value = value

    def cpu(self):
        return self.value


def test_a_checkpoint_keeps_no_whole_average_on_the_device(begun, monkeypatch):
    monkeypatch.setattr("bdpo_pl.training.checkpointed.whole", OnDevice)
    saved = torch.load(begun(optimizer=ScheduleFreeAdamW, lr_schedule="constant"), weights_only=True)
    assert all(isinstance(value, torch.Tensor) for value in saved["state_dict"].values())


def test_comprehension_under_the_policy_is_left_out_where_it_is_not_measured(job, begun):
    resumed = at_once(job, begun(reestimate_every=2))
    assert resumed.reestimation.values("train", torch.arange(2)) is None


def test_a_reference_that_has_followed_the_policy_is_not_lost(job, begun, monkeypatch):
    moving = {"loss": DPOLoss(), "reference_mode": "live"}
    checkpoint = begun(reference_sync=SyncOptions(every=2), **moving)
    with pytest.raises(InputError, match=r"set model\.reference_sync\.every as it was, or, to keep"):
        at_once(job, checkpoint, **moving)
    # Where the run is compared with its checkpoint, before anything is loaded.
    monkeypatch.setattr("bdpo_pl.training.module.load_model", lambda *_: pytest.fail("loaded"))
    with pytest.raises(InputError, match="it would be lost for the one of the start"):
        at_once(job, checkpoint, callbacks=[RunIdentity(checkpoint)], **moving)
