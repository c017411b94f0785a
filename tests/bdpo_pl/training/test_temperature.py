"""τ found from the training pairs, on its way through a run: log, checkpoint and resume."""

import csv

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from training import fit, same, weights

from bdpo_pl.errors import InputError
from bdpo_pl.losses import BalancedDPOLoss


def test_tau_is_the_spread_of_the_training_pairs_in_log_and_checkpoint_and_a_resume_goes_on_with_it(job, tmp_path):
    keep = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=5, save_top_k=-1, filename="{step}")
    whole = fit(job("whole", trainer={"callbacks": [keep]}, loss=BalancedDPOLoss(tau="auto")))
    chosen, rejected = whole.reference.scores("train", torch.arange(32)).comprehension.double()
    difference = chosen - rejected
    tau = 1.4826 * (difference - difference.quantile(0.5)).abs().quantile(0.5).item()
    assert whole.loss.temperature() == pytest.approx(tau, rel=1e-6)
    path = tmp_path / "ckpt" / "step=5.ckpt"
    saved = torch.load(path, weights_only=True)["bdpo_pl"]
    assert saved["loss"] == {"tau": pytest.approx(tau)}
    with (tmp_path / "whole" / "metrics.csv").open() as file:
        logged = [float(row["train/tau"]) for row in csv.DictReader(file) if row["train/tau"]]
    assert logged == pytest.approx([tau] * len(logged))
    assert logged
    assert yaml.safe_load((tmp_path / "whole" / "hparams.yaml").read_text()) == {"loss.tau": pytest.approx(tau)}
    # Of the checkpoint, whatever this run's pairs would give.
    resumed = fit(job("resumed", loss=BalancedDPOLoss(tau="auto")), ckpt_path=str(path))
    assert same(weights(whole), weights(resumed))
    number = fit(job("number", loss=BalancedDPOLoss(tau=tau)))
    assert same(weights(whole), weights(number))


def test_a_live_reference_has_no_scores_to_find_tau_from(job):
    with pytest.raises(InputError, match=r"live there are none.*or give model\.loss\.tau a number"):
        fit(job(reference_mode="live", loss=BalancedDPOLoss(tau="auto")))
