"""The baselines in training, fused and on logits, and each by its name on the command line."""

import math

import pytest
import torch
import yaml
from baselines import LOSSES, REFERENCE_FREE
from makers import preference_rows, write_jsonl
from training import fit, sgd, weights

from bdpo_pl.errors import InputError
from bdpo_pl.fit import main
from bdpo_pl.losses import RMiPOLoss, SimPOLoss
from bdpo_pl.scoring.reference import Reference

pytestmark = pytest.mark.usefixtures("seeded")


# In training


def flagged(rows):
    return [{**row, "chosen_safe": True, "rejected_safe": i % 3 > 0} for i, row in enumerate(rows)]


@pytest.fixture
def flagged_job(job, tmp_path):
    """As `job`, on pairs that say which responses are safe."""
    write_jsonl(tmp_path / "pairs.jsonl", flagged(preference_rows(40)))
    return job


def two_steps(job, name, **options):
    return fit(job(name, trainer={"max_steps": 2, "val_check_interval": 2}, **options))


@pytest.mark.parametrize("loss", LOSSES)
def test_two_steps_fused_and_on_logits(flagged_job, loss):
    fused, plain = (two_steps(flagged_job, head, loss=loss(), lm_head=head) for head in ("fused", "logits"))
    for name, value in weights(fused).items():
        torch.testing.assert_close(value, weights(plain)[name], rtol=1e-4, atol=1e-5, msg=name)
    values = fused.evaluations[2]
    assert {"held_out/loss", "held_out/margin", "held_out/accuracy", "gap/margin"} <= values.keys()
    assert all(math.isfinite(value) for value in values.values())
    assert ("held_out/drift_chosen" in values) == (loss not in REFERENCE_FREE)
    expected = loss().initial_value
    if expected is not None:
        assert fused.evaluations[0]["held_out/loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("loss", REFERENCE_FREE)
def test_a_loss_without_reference_has_nothing_scored_unless_asked(job, loss, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        patch.setattr(Reference, "_load", lambda *_: pytest.fail("the reference was loaded"))
        patch.setattr(Reference, "_live", lambda *_: pytest.fail("a live reference was asked"))
        free = two_steps(job, "free", loss=loss())
    assert caplog.text.count("reads no reference, so no pair is scored") == 1
    asked = two_steps(job, "asked", loss=loss(), reference_mode="precomputed")
    assert free.reference_mode == "none"
    more = asked.evaluations[2].keys() - free.evaluations[2].keys()
    names = ("drift_chosen", "drift_rejected", "comprehension_chosen", "comprehension_rejected")
    assert more == {f"{split}/{name}" for split in ("held_out", "train_probe") for name in names}
    assert all(torch.equal(value, weights(asked)[name]) for name, value in weights(free).items())


def test_a_reference_that_is_named_is_scored(job, model_dir):
    assert two_steps(job, "named", loss=SimPOLoss(), reference=str(model_dir)).reference_mode == "precomputed"


def test_rmipo_takes_up_what_is_measured_anew_on_the_policy(job):
    once, anew = (two_steps(job, str(k), loss=RMiPOLoss(), reestimate_every=k) for k in (None, 1))
    assert any(not torch.equal(value, weights(anew)[name]) for name, value in weights(once).items())


@pytest.mark.parametrize("options", [{"reference_mode": "none"}, {"scoring": "no comprehension"}])
def test_rmipo_without_comprehension_is_refused(job, options):
    from bdpo_pl.scoring.scoring_pass import ScoringOptions

    if "scoring" in options:
        options = {"scoring": ScoringOptions(comprehension=False)}
    with pytest.raises(InputError, match="RMiPOLoss needs"):
        two_steps(job, "refused", loss=RMiPOLoss(), **options)


@pytest.mark.parametrize("loss", LOSSES)
def test_mean_over_pairs_is_exact_under_accumulation(flagged_job, loss):
    def gradient_step(name, batch_size, accumulate):
        trainer = {"max_steps": 1, "accumulate_grad_batches": accumulate, "num_sanity_val_steps": 0}
        data = {"batch_size": batch_size}
        return weights(fit(flagged_job(name, trainer=trainer, data=data, loss=loss(), optimizer=sgd)))

    whole, parts = gradient_step("whole", 4, 1), gradient_step("parts", 1, 4)
    for name, value in whole.items():
        torch.testing.assert_close(value, parts[name], rtol=1e-4, atol=1e-6, msg=name)


# On the command line


@pytest.fixture
def base(model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BDPO_PL_CACHE", str(tmp_path / "cache"))
    pairs = write_jsonl(tmp_path / "pairs.jsonl", flagged(preference_rows(24)))
    return [
        f"--model.policy={model_dir}", f"--data.train={pairs}", "--data.held_out_fraction=0.2", "--export=false",
        "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.max_steps=2",
    ]  # fmt: skip


def chosen_loss(tmp_path):
    return yaml.safe_load((tmp_path / "runs/version_0/config.yaml").read_text())["model"]["loss"]


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        ("IPOLoss", {"beta": 0.1}),
        ("CPOLoss", {"beta": 0.1, "alpha": 1.0, "nll": "mean"}),
        ("SimPOLoss", {"beta": 2.5, "gamma_beta_ratio": 0.1}),
        ("SafeDPOLoss", {"beta": 0.1, "delta": 10.0}),
        ("RMiPOLoss", {"beta": 2.0, "gamma_floor": 0.3, "gamma_range": 1.3}),
    ],
)
def test_each_runs_by_its_name_with_defaults_of_its_own(base, tmp_path, capsys, loss, options):
    """jsonargparse would hand Balanced DPO's β down to it."""
    main([*base, f"--model.loss={loss}"])
    assert chosen_loss(tmp_path) == {"class_path": f"bdpo_pl.losses.{loss}", "init_args": options}
    printed = capsys.readouterr().out
    assert "2 optimiser steps" in printed
    assert "held-out margin" in printed
    assert ("drift of the chosen" in printed) == (loss not in ("CPOLoss", "SimPOLoss"))
    assert (tmp_path / "cache").exists() == (loss not in ("CPOLoss", "SimPOLoss"))


@pytest.mark.parametrize(
    ("files", "options", "expected"),
    [
        ([{"class_path": "bdpo_pl.losses.SimPOLoss"}], [], {"beta": 2.5, "gamma_beta_ratio": 0.1}),
        ([{"class_path": "SimPOLoss", "init_args": {"beta": 3.0}}], ["--model.loss.gamma_beta_ratio=0.5"],
         {"beta": 3.0, "gamma_beta_ratio": 0.5}),
        ([{"class_path": "DPOLoss", "init_args": {"beta": 0.3}}], ["--model.loss", "SimPOLoss"],
         {"beta": 2.5, "gamma_beta_ratio": 0.1}),
        ([{"class_path": "DPOLoss", "init_args": {"beta": 0.3}}], [],
         {"beta": 0.3, "label_smoothing": 0.0, "sft_weight": 0.0}),
        ([{"class_path": "DPOLoss"}], ["--model.loss.beta=0.3"],
         {"beta": 0.3, "label_smoothing": 0.0, "sft_weight": 0.0}),
    ],
)  # fmt: skip
def test_options_of_one_loss_do_not_reach_another(base, tmp_path, capsys, files, options, expected):
    configs = []
    for i, loss in enumerate(files):
        path = tmp_path / f"{i}.yaml"
        path.write_text(yaml.safe_dump({"model": {"loss": loss}}))
        configs.append(f"--config={path}")
    with pytest.raises(SystemExit):
        main([*configs, *base, *options, "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["model"]["loss"]["init_args"] == expected
