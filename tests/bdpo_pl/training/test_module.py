"""Training through Lightning: the first loss, exactness, resuming, guards and what is logged."""

import csv
import gc
import math
import sys
import warnings

import lightning as L
import pytest
import torch
from counting import HostReads
from lightning.pytorch.callbacks import ModelCheckpoint
from makers import build_model, build_tokenizer
from training import fit, rows, same, weights

from bdpo_pl.errors import InputError, NonFiniteError
from bdpo_pl.losses import BalancedDPOLoss, DPOLoss
from bdpo_pl.models.loading import ModelSource
from bdpo_pl.scoring.scoring_pass import ScoringOptions
from bdpo_pl.training.module import PreferenceModule
from bdpo_pl.training.optim import adamw as default_adamw


@pytest.mark.parametrize("loss", [DPOLoss(), BalancedDPOLoss(), BalancedDPOLoss(scale="norm", estimator="hsic")])
def test_first_loss_is_ln2_and_training_lowers_it(job, loss):
    module = fit(job(loss=loss, trainer={"max_epochs": 3}))
    before, after = module.evaluations[0], module.evaluations[24]
    assert before["held_out/loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert before["train_probe/margin"] == pytest.approx(0, abs=1e-4)
    assert after["held_out/loss"] < before["held_out/loss"] - 0.05
    assert after["held_out/accuracy"] > 0.9
    assert after["gap/margin"] == pytest.approx(after["train_probe/margin"] - after["held_out/margin"])


def test_reference_that_disagrees_at_the_start_is_warned_of(job, monkeypatch):
    trainer, module, data = job(loss=DPOLoss())
    prepare = "bdpo_pl.scoring.reference.Reference.scores"
    from bdpo_pl.scoring.reference import Reference, SplitScores

    honest = Reference.scores

    def shifted(self, *args):
        scores = honest(self, *args)
        return SplitScores(scores.reference + torch.tensor([[1.0], [-1.0]]), scores.comprehension)

    monkeypatch.setattr(prepare, shifted)
    with pytest.warns(UserWarning, match="first loss is off by"):
        trainer.fit(module, data)


def test_honest_start_does_not_warn(job):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*first loss.*")
        fit(job())


def test_same_seed_same_weights_to_the_last_bit(job):
    first, second = weights(fit(job("a"))), weights(fit(job("b")))
    assert same(first, second)
    assert not same(first, weights(fit(job("c", data={"seed": 1}))))


def test_interrupted_and_resumed_equals_uninterrupted(job, tmp_path):
    whole = fit(job("whole", trainer={"max_epochs": 3}))
    middle = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=5, save_top_k=-1, filename="{step}")
    stop = {"max_epochs": 3, "callbacks": [middle]}

    class Stop(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 12:
                raise KeyboardInterrupt

    with pytest.raises((SystemExit, KeyboardInterrupt)):
        fit(job("part", trainer={**stop, "callbacks": [middle, Stop()]}))
    # In the second epoch: 8 steps an epoch.
    resumed = fit(job("resumed", trainer={"max_epochs": 3}), ckpt_path=str(tmp_path / "ckpt" / "step=10.ckpt"))
    assert same(weights(whole), weights(resumed))
    assert whole.evaluations[24] == resumed.evaluations[24]


def test_resume_from_the_end_of_an_epoch(job, tmp_path):
    whole = fit(job("whole", trainer={"max_epochs": 2}))
    keep = ModelCheckpoint(tmp_path / "ckpt", save_top_k=-1, filename="{epoch}")
    fit(job("keeping", trainer={"max_epochs": 2, "callbacks": [keep]}))
    resumed = fit(job("resumed", trainer={"max_epochs": 2}), ckpt_path=str(tmp_path / "ckpt" / "epoch=0.ckpt"))
    assert same(weights(whole), weights(resumed))


@pytest.mark.parametrize("batch_size", [1, 4])
def test_accumulation_gives_the_weights_of_the_whole_batch(job, batch_size):
    # 32 training pairs in steps of 12: the last step holds 8.
    whole = weights(fit(job("whole", data={"batch_size": 12})))
    parts = weights(
        fit(job("parts", data={"batch_size": batch_size}, trainer={"accumulate_grad_batches": 12 // batch_size}))
    )
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], rtol=1e-4, atol=1e-5)


def test_live_reference_equals_the_precomputed_one(job):
    precomputed = fit(job("precomputed", loss=BalancedDPOLoss(tau=0.25)))
    live = fit(job("live", loss=BalancedDPOLoss(tau=0.25), reference_mode="live"))
    for step, values in precomputed.evaluations.items():
        assert live.evaluations[step] == pytest.approx(values, abs=1e-4)


@pytest.mark.parametrize(("mode", "models"), [("precomputed", 1), ("live", 2)])
def test_training_holds_no_reference_once_its_scores_are_known(job, mode, models):
    from transformers import PreTrainedModel

    def living():
        return sum(isinstance(thing, PreTrainedModel) for thing in gc.get_objects()) // per_model

    class Count(L.Callback):
        def on_train_batch_start(self, *_):
            counts.append(living())

    per_model = sum(isinstance(part, PreTrainedModel) for part in build_model().modules())
    gc.collect()
    before, counts = living(), []
    fit(job(trainer={"callbacks": [Count()]}, loss=BalancedDPOLoss(tau=0.25), reference_mode=mode))
    assert {count - before for count in counts} == {models}


@pytest.mark.parametrize(
    ("trainer", "options", "loads"),
    [({}, {}, 1), ({"precision": "bf16-mixed"}, {}, 2), ({}, {"reference_mode": "live", "loss": DPOLoss()}, 2)],
    ids=["precomputed", "its products in half precision", "live"],
)
def test_a_policy_that_was_its_own_reference_is_loaded_once(job, monkeypatch, trainer, options, loads):
    from bdpo_pl.models.loading import load_model

    loaded = []
    for module in ("bdpo_pl.training.module", "bdpo_pl.scoring.reference"):
        monkeypatch.setattr(f"{module}.load_model", lambda *args: loaded.append(args) or load_model(*args))
    before = load_model(ModelSource(job()[1].source.name), torch.float32).state_dict()
    trained = fit(job(trainer={"max_steps": 2, **trainer}, **options))
    assert len(loaded) == loads
    assert trained.policy.training
    for name, parameter in trained.policy.named_parameters():
        assert parameter.requires_grad, name
        assert not torch.equal(parameter, before[name]), name


def test_checkpoint_holds_the_policy_alone_and_no_pickled_code(job, tmp_path, model_dir):
    keep = ModelCheckpoint(tmp_path / "ckpt", filename="end")
    for name, mode in (("a", "precomputed"), ("b", "live")):
        module = fit(job(name, trainer={"callbacks": [keep]}, loss=DPOLoss(), reference_mode=mode))
        checkpoint = torch.load(keep.best_model_path, weights_only=True)
        assert {key.split(".")[0] for key in checkpoint["state_dict"]} == {"policy"}
        assert len(checkpoint["state_dict"]) == len(module.policy.state_dict())
        assert checkpoint["bdpo_pl"]["policy"] == str(model_dir)


def test_checkpoint_of_another_model_is_refused(job, tmp_path):
    keep = ModelCheckpoint(tmp_path / "ckpt", filename="end")
    fit(job("a", trainer={"callbacks": [keep]}))
    build_model().save_pretrained(tmp_path / "other")
    build_tokenizer().save_pretrained(tmp_path / "other")
    trainer, _, data = job("b")
    other = PreferenceModule(str(tmp_path / "other"), scoring=ScoringOptions(cache_dir=str(tmp_path / "cache")))
    with pytest.raises(InputError, match="checkpoint holds weights of"):
        trainer.fit(other, data, ckpt_path=keep.best_model_path, weights_only=True)


class NaNAfter(DPOLoss):
    """DPO whose loss is NaN from a given call on."""

    def __init__(self, calls):
        super().__init__()
        self.left = calls

    def __call__(self, policy_chosen, policy_rejected, scores):
        self.left -= policy_chosen.requires_grad
        losses = super().__call__(policy_chosen, policy_rejected, scores)
        return losses * float("nan") if self.left < 0 else losses


def test_nan_loss_stops_names_the_batch_and_keeps_the_last_good_state(job, tmp_path):
    def options(steps):
        return {"trainer": {"max_steps": steps, "max_epochs": -1}, "lr_schedule": "constant", "warmup_ratio": 0.0}

    good = weights(fit(job("good", loss=DPOLoss(), **options(3))))
    trainer, module, data = job("bad", loss=NaNAfter(3), **options(6))
    with pytest.raises(
        NonFiniteError, match=r"epoch 0, batch 3 \(after 3 optimiser steps\).*pairs\.jsonl, line \d+"
    ) as stopped:
        trainer.fit(module, data)
    last = tmp_path / "bad" / "checkpoints" / "last-good.ckpt"
    # `last` is an older one.
    assert str(stopped.value).endswith(f"; then resume with --ckpt_path {last}")
    checkpoint = torch.load(last, weights_only=True)
    for name, value in good.items():
        assert torch.equal(checkpoint["state_dict"][f"policy.{name}"], value)


@pytest.mark.parametrize("batch", [0, 5, 7])
def test_the_last_good_state_amid_an_accumulation_loses_no_pair(job, tmp_path, batch):
    """Eight batches, four to a step: the first of a step, one within it, and its last."""
    trainer = {"accumulate_grad_batches": 4, "log_every_n_steps": 1}
    bad, module, data = job("bad", loss=NaNAfter(batch), trainer=dict(trainer))
    with pytest.raises(NonFiniteError, match=rf"batch {batch} \(after {batch // 4} optimiser steps"):
        bad.fit(module, data)
    whole = fit(job("whole", loss=DPOLoss(), trainer=dict(trainer)))
    last = tmp_path / "bad" / "checkpoints" / "last-good.ckpt"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*in the middle of an accumulation")
        resumed = fit(job("resumed", loss=DPOLoss(), trainer=dict(trainer)), ckpt_path=str(last))
    assert same(weights(whole), weights(resumed))
    steps = [[row["step"] for row in rows(tmp_path / name / "metrics.csv")] for name in ("whole", "resumed")]
    assert steps[1] == steps[0][-len(steps[1]) :]


def test_a_batch_is_waited_for_once_and_a_step_once_more(job, monkeypatch):
    """Whether the loss is finite, before its batch is counted, and whether the gradient's norm is, before the step."""
    # Lengths that the collate function has counted are only checked on a CPU.
    monkeypatch.setattr(sys.modules["bdpo_kernels.linear_preference_loss"], "check_length_values", lambda *_: None)
    quick = {"max_steps": 2, "max_epochs": -1, "limit_val_batches": 0, "num_sanity_val_steps": 0}
    trainer, module, data = job(trainer={"accumulate_grad_batches": 2, **quick})
    found = []

    def counted(name):
        method = getattr(module, name)

        def call(*args):
            with HostReads() as reads:
                result = method(*args)
            found.append((name, reads.calls))
            return result

        monkeypatch.setattr(module, name, call)

    for name in ("training_step", "on_before_optimizer_step"):
        counted(name)
    trainer.fit(module, data)
    (_, first), *found = found
    # Trials, and the comparison of the first loss.
    assert len(first) > 1
    batch, step = ("training_step", ["__bool__"]), ("on_before_optimizer_step", ["__bool__"])
    assert found == [batch, step, batch, batch, step]


class NaNGradient(DPOLoss):
    """A finite loss with a gradient that is not."""

    def __call__(self, policy_chosen, policy_rejected, scores):
        losses = super().__call__(policy_chosen, policy_rejected, scores)
        if losses.requires_grad:
            losses.register_hook(lambda g: g * float("inf"))
        return losses


@pytest.mark.parametrize("precision", ["32-true", "16-true"])
def test_gradient_that_is_not_finite_stops_before_the_step(job, precision):
    trainer, module, data = job(loss=NaNGradient(), trainer={"precision": precision})
    with pytest.raises(NonFiniteError, match=r"gradient's norm is (nan|inf) at optimiser step 0"):
        trainer.fit(module, data)
    assert all(torch.isfinite(p).all() for p in module.policy.parameters())


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"reference_mode": "none"}, "needs a reference model"),
        ({"scoring": ScoringOptions(comprehension=False)}, "needs comprehension"),
        ({"data": {"max_length": 4096}}, "positions for 512 tokens"),
        ({"data": {"tokenizer": "/nowhere"}}, "no model folder at '/nowhere'"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(job, options, fault):
    trainer, module, data = job(**options)
    with pytest.raises(InputError, match=fault):
        trainer.fit(module, data)
    assert module.policy is None


def test_tokenizer_of_another_model_is_refused(job, tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.add_tokens([*(f"<extra{i}>" for i in range(200)), "garden"])
    tokenizer.save_pretrained(tmp_path / "larger")
    trainer, module, data = job(data={"tokenizer": str(tmp_path / "larger")})
    with pytest.raises(InputError, match="embeds only 400 tokens"):
        trainer.fit(module, data)


def test_unknown_and_incomplete_models_are_refused(tmp_path, job):
    from safetensors.torch import load_file, save_file

    from bdpo_pl.models.loading import ModelSource, load_model, load_tokenizer

    for load in (load_tokenizer, lambda source: load_model(source, torch.float32)):
        with pytest.raises(InputError, match="no model folder"):
            load(ModelSource(str(tmp_path / "nothing")))
        with pytest.raises(InputError, match="nobody/nothing"):
            load(ModelSource("nobody/nothing"))
    build_model().save_pretrained(tmp_path / "broken")
    file = tmp_path / "broken" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks 1 weights.*model\.norm\.weight"):
        load_model(ModelSource(str(tmp_path / "broken")), torch.float32)


def test_dropout_is_off_in_policy_and_reference(tmp_path):
    from bdpo_pl.models.loading import ModelSource, load_model

    build_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5).save_pretrained(tmp_path)
    model = load_model(ModelSource(str(tmp_path)), torch.float32).train()
    ids = torch.arange(8)[None]
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_curves_hold_every_metric(job, tmp_path):
    fit(job("run", trainer={"max_epochs": 2}))
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = set(rows[0])
    for split in ("train", "held_out", "train_probe"):
        for name in ("loss", "margin", "accuracy", "imbalance"):
            assert f"{split}/{name}" in names
        for name in ("reward", "logp", "drift", "weight", "comprehension"):
            assert {f"{split}/{name}_chosen", f"{split}/{name}_rejected"} <= names
    assert {"gap/margin", "gap/accuracy", "train/tokens_per_second", "train/grad_norm", "train/lr"} <= names
    steps = [int(row["step"]) for row in rows if row["train/loss"]]
    assert steps == [1, 3, 5, 7, 9, 11, 13, 15]
    for row in rows:
        if row["train/loss"]:
            assert float(row["train/margin"]) == pytest.approx(
                float(row["train/reward_chosen"]) - float(row["train/reward_rejected"]), abs=1e-5
            )
            assert float(row["train/weight_chosen"]) + float(row["train/weight_rejected"]) == pytest.approx(1, abs=1e-5)


def test_comprehension_off_trains_dpo(job):
    module = fit(job(loss=DPOLoss(), scoring=ScoringOptions(comprehension=False)))
    assert "held_out/comprehension_chosen" not in module.evaluations[8]
    assert module.evaluations[8]["held_out/loss"] < math.log(2)


def test_nothing_held_out_trains_without_validation(job):
    module = fit(job(data={"held_out_fraction": 0.0}))
    assert module.evaluations == {}
    assert module.global_step == 10


def test_gradient_checkpointing_changes_no_number(job):
    plain, saving = fit(job("a")), fit(job("b", gradient_checkpointing=True))
    for name, value in weights(plain).items():
        torch.testing.assert_close(value, weights(saving)[name], rtol=1e-5, atol=1e-6)


def test_updates_that_bfloat16_weights_would_lose_are_warned_of(job):
    trainer, module, data = job(trainer={"precision": "bf16-true", "max_steps": 1}, optimizer=default_adamw)
    with pytest.warns(UserWarning, match="updates are lost.*bf16-mixed"):
        trainer.fit(module, data)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_bfloat16_trains(job, precision):
    module = fit(job(trainer={"precision": precision, "max_epochs": 3}))
    assert module.evaluations[0]["held_out/loss"] == pytest.approx(math.log(2), abs=2e-2)
    assert module.evaluations[24]["held_out/loss"] < 0.68
    expected = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert next(module.policy.parameters()).dtype == expected
