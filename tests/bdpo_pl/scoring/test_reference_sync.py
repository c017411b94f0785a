"""TR-DPO: a reference that follows the policy."""

import math

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from makers import build_model, preference_rows, write_jsonl
from training import fit, same, weights

from bdpo_pl.errors import InputError
from bdpo_pl.losses import DPOLoss
from bdpo_pl.models.adapters import LoraOptions
from bdpo_pl.scoring.reference_sync import ReferenceSync, SyncOptions, mix


@pytest.fixture(autouse=True)
def few_pairs(job, tmp_path):
    write_jsonl(tmp_path / "pairs.jsonl", preference_rows(20))


class Watch(L.Callback):
    """The policy's weights after each step, and the reference's before the next."""

    def __init__(self):
        self.policy, self.reference = [], []

    def on_train_batch_start(self, trainer, module, *_):
        self.policy.append(weights(module))

    def on_before_zero_grad(self, trainer, module, *_):
        self.reference.append({n: p.clone() for n, p in module.reference.model.named_parameters()})


def test_mixing_is_the_formula_and_trls():
    policy, reference, theirs = build_model(), build_model().requires_grad_(False), build_model()
    torch.manual_seed(1)
    with torch.no_grad():
        for p in policy.parameters():
            p += torch.randn_like(p)
    before = dict(reference.named_parameters())
    expected = {name: 0.3 * p.double() + 0.7 * before[name].double() for name, p in policy.named_parameters()}
    mix(policy, reference, 0.3)
    for name, value in reference.named_parameters():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-6, atol=1e-7)
    callbacks = pytest.importorskip("trl.trainer.callbacks")
    callbacks.SyncRefModelCallback._sync_target_model(policy, theirs, 0.3)
    for ours, other in zip(reference.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-6, atol=1e-7)


def test_reference_follows_each_two_steps_and_validation_meets_the_new_one(job):
    watch = Watch()
    trainer = {"max_steps": 4, "val_check_interval": 4, "callbacks": [watch]}
    module = fit(job(loss=DPOLoss(), reference_sync=SyncOptions(every=2, mixup=1.0), trainer=trainer))
    assert module.reference_mode == "live"
    assert same(watch.reference[0], watch.policy[0])
    assert not same(watch.reference[1], watch.policy[1])
    # After two steps it is the policy of that moment, and stays so for two.
    assert same(watch.reference[2], watch.policy[2])
    assert same(watch.reference[3], watch.policy[2])
    # After four steps the two are one model again, when the held-out pairs are measured.
    assert module.evaluations[4]["held_out/loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_a_resumed_run_meets_the_reference_as_it_was(job, tmp_path):
    keep = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    best = ModelCheckpoint(tmp_path / "best", every_n_train_steps=4, save_weights_only=True, filename="end")
    make = {"loss": DPOLoss(), "reference_sync": SyncOptions(every=2, mixup=0.5)}
    whole = fit(job("whole", trainer={"max_steps": 5, "callbacks": [keep, best]}, **make))
    # At step 2 the checkpoint is written before the reference follows; at step 3 after it.
    for step in (2, 3):
        path = str(tmp_path / "ckpt" / f"step={step}.ckpt")
        resumed = fit(job(f"again-{step}", trainer={"max_steps": 5}, **make), ckpt_path=path)
        assert same(weights(whole), weights(resumed))
        assert same(dict(whole.reference.model.named_parameters()), dict(resumed.reference.model.named_parameters()))
    saved = torch.load(tmp_path / "best" / "end.ckpt", weights_only=True)["bdpo_pl"]
    assert "reference_sync" not in saved
    # In another fit of the same module it follows again from the first steps on, and until then it is not lost.
    whole.sync.begin(0, torch.float32)
    assert whole.sync.due(2)
    assert whole.sync.state_dict(whole.reference)["weights"].keys()


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"reference_mode": "precomputed"}, "needs a live reference, and model.reference_mode is precomputed"),
        ({"lora": LoraOptions(r=4)}, "mixes whole weights, and model.lora trains adapters"),
        ({"reference": "embedded"}, "needs the policy's own model as the reference"),
    ],
)
def test_what_does_not_fit_is_refused(job, options, fault):
    with pytest.raises(InputError, match=fault):
        fit(job(loss=DPOLoss(), reference_sync=SyncOptions(every=2), **options))


def test_small_changes_that_rounding_loses_are_warned_of(recwarn):
    reference, policy = (torch.nn.Linear(1, 1, bias=False).bfloat16() for _ in range(2))
    reference.weight.data[:], policy.weight.data[:] = 1.0, 1.0 + 2**-7
    mix(policy, reference, 0.4)
    assert reference.weight == 1.0
    with pytest.warns(UserWarning, match=r"mixup is 0\.4, .* in bfloat16: .* small changes .* bf16-mixed"):
        ReferenceSync(SyncOptions(every=2, mixup=0.4)).begin(0, torch.bfloat16)
    for options, dtype in (({"mixup": 0.4}, torch.float32), ({"mixup": 0.5}, torch.bfloat16)):
        ReferenceSync(SyncOptions(every=2, **options)).begin(0, dtype)
    ReferenceSync(SyncOptions(mixup=0.4)).begin(0, torch.bfloat16)
    assert not recwarn


@pytest.mark.parametrize("values", [{"every": 0}, {"mixup": 0.0}, {"mixup": 1.1}])
def test_values_out_of_range_are_named(values):
    with pytest.raises(InputError, match=rf"model.reference_sync.{next(iter(values))} must be"):
        SyncOptions(**values)
