"""LoRA: the policy as it was before is the reference, and checkpoints hold the adapters alone."""

import gc
import math
import sys

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from makers import build_model
from training import fit, same, weights

from bdpo_pl.errors import InputError
from bdpo_pl.losses import BalancedDPOLoss
from bdpo_pl.models import adapters
from bdpo_pl.models.adapter_export import export_adapter
from bdpo_pl.models.adapters import LoraOptions, is_adapter
from bdpo_pl.models.before_training import adapters_off
from bdpo_pl.models.checkpoint import plain_model
from bdpo_pl.models.loading import ModelSource, load_model
from bdpo_pl.parallel.state import whole_state

IDS = torch.arange(5, 40)[None]


def options(**changes):
    return LoraOptions(**{"r": 4, "alpha": 8, **changes})


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.fixture
def lora_job(job):
    return lambda folder="lora", **changes: job(folder, **{"lora": options(), "trainer": {"max_epochs": 2}, **changes})


def test_only_adapters_are_trained_and_the_base_is_the_reference_to_the_last_bit(lora_job, model_dir):
    module = fit(lora_job())
    base = load_model(ModelSource(str(model_dir)), torch.float32)
    assert module.evaluations[0]["held_out/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert module.evaluations[16]["held_out/loss"] < math.log(2) - 0.01
    trained = {name for name, p in module.policy.named_parameters() if p.requires_grad}
    assert trained
    assert all(is_adapter(name) for name in trained)
    assert len(trained) == 2 * 2 * 7  # two layers of seven matrices, two halves each
    expected = logits(base)
    assert not torch.equal(logits(module.policy), expected)
    with adapters_off(module.policy) as reference:
        assert torch.equal(logits(reference), expected)
    assert {name for name, p in module.policy.named_parameters() if p.requires_grad} == trained


def test_no_second_model_is_loaded_or_held(lora_job, monkeypatch):
    from transformers import PreTrainedModel

    import bdpo_pl.training.module

    loads, counts = [], []
    load = bdpo_pl.training.module.load_model
    monkeypatch.setattr("bdpo_pl.training.module.load_model", lambda *args: loads.append(args) or load(*args))
    monkeypatch.setattr("bdpo_pl.scoring.reference.load_model", lambda *args: pytest.fail("the reference was loaded"))
    per_model = sum(isinstance(part, PreTrainedModel) for part in build_model().modules())

    def living():
        gc.collect()
        return sum(isinstance(thing, PreTrainedModel) for thing in gc.get_objects()) // per_model

    class Count(L.Callback):
        def on_train_start(self, *_):
            counts.append(living())

    before = living()
    fit(lora_job(trainer={"max_steps": 1, "callbacks": [Count()]}))
    assert len(loads) == 1
    assert counts == [before + 1]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_live_reference_equals_the_precomputed_one(lora_job, precision):
    """Under autocast too, where a pass without gradients could leave casts behind that the next one must not use."""
    trainer, loss = {"max_epochs": 2, "precision": precision}, BalancedDPOLoss(tau=0.25)
    precomputed = fit(lora_job("a", trainer=dict(trainer), loss=loss))
    live = fit(lora_job("b", trainer=dict(trainer), loss=loss, reference_mode="live"))
    bound = 1e-5 if precision == "32-true" else 2e-2
    assert live.evaluations[16] == pytest.approx(precomputed.evaluations[16], abs=bound)
    moved = [p.abs().max() for name, p in live.policy.named_parameters() if ".lora_B." in name]
    assert min(moved) > 1e-4


def test_checkpoint_holds_the_adapters_alone_and_resuming_is_exact(lora_job, tmp_path):
    keep = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=5, save_top_k=-1, filename="{step}")
    whole = fit(lora_job("whole", trainer={"max_epochs": 2, "callbacks": [keep]}))
    path = tmp_path / "ckpt" / "step=10.ckpt"
    names = torch.load(path, weights_only=True)["state_dict"]
    assert names.keys() == {f"policy.{name}" for name, p in whole.policy.named_parameters() if p.requires_grad}
    resumed = fit(lora_job("resumed"), ckpt_path=str(path))
    assert same(weights(whole), weights(resumed))
    assert resumed.evaluations[16] == whole.evaluations[16]


def test_checkpoint_of_another_kind_of_run_is_refused(job, lora_job, tmp_path):
    full = ModelCheckpoint(tmp_path / "full", filename="end")
    fit(job("full", trainer={"max_steps": 1, "callbacks": [full]}))
    lora = ModelCheckpoint(tmp_path / "lora", filename="end")
    fit(lora_job("lora", trainer={"max_steps": 1, "callbacks": [lora]}))
    with pytest.raises(InputError, match=r"written with model\.lora None, but it is now {'r': 4"):
        fit(lora_job("a"), ckpt_path=full.best_model_path)
    with pytest.raises(InputError, match=r"written with model\.lora {'r': 4.*, but it is now {'r': 2"):
        fit(lora_job("b", lora=options(r=2)), ckpt_path=lora.best_model_path)
    with pytest.raises(InputError, match=r"written with model\.lora {'r': 4.*, but it is now None"):
        fit(job("c"), ckpt_path=lora.best_model_path)


def test_export_merges_and_the_adapter_alone_loads_in_peft(lora_job, model_dir, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    module = fit(lora_job())
    state = whole_state(module.policy, trained_only=True)
    expected = logits(module.policy)
    merged = plain_model(module.source, torch.float32, state, module.lora)
    assert not any(is_adapter(name) for name in merged.state_dict())
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected, rtol=1e-4, atol=1e-5
    )
    base = load_model(module.source, torch.float32)
    export_adapter(base, module.lora, state, tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(load_model(module.source, torch.float32), tmp_path / "adapter")
    assert torch.equal(logits(loaded), expected)


def test_gradient_checkpointing_changes_no_number(lora_job):
    plain, saving = weights(fit(lora_job("a"))), weights(fit(lora_job("b", gradient_checkpointing=True)))
    for name, value in plain.items():
        torch.testing.assert_close(value, saving[name], rtol=1e-5, atol=1e-6)


def test_adapters_start_alike_whatever_was_drawn_before_them():
    first, second = build_model(), build_model()
    adapters.add_adapters(first, options())
    torch.rand(7)
    adapters.add_adapters(second, options())
    values = {name: p for name, p in first.named_parameters() if is_adapter(name)}
    assert same(values, dict(second.named_parameters()))
    drawn = [p for name, p in values.items() if ".lora_A." in name]
    assert not torch.equal(drawn[0], drawn[7])


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"r": 0}, "lora.r must be at least 1"),
        ({"alpha": 0}, "lora.alpha must be above 0"),
        ({"dropout": 1.0}, r"lora.dropout must be in \[0, 1\)"),
        ({"quantize": "int3"}, "lora.quantize must be none or nf4"),
    ],
)
def test_options_out_of_range_are_named(values, fault):
    with pytest.raises(InputError, match=fault):
        options(**values)


def test_what_is_missing_is_named(lora_job, monkeypatch):
    with pytest.raises(InputError, match=r"target_modules \['nowhere'\]"):
        fit(lora_job(lora=options(target_modules=["nowhere"])))
    with pytest.warns(UserWarning, match="noise that its reference does not have"):
        adapters.add_adapters(build_model(), options(dropout=0.1))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="quantize is nf4, but this process sees no CUDA GPU"):
        fit(lora_job(lora=options(quantize="nf4")))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'bitsandbytes is not installed; pip install "bdpo-pl\[qlora\]"'):
        adapters.quantization_config(options(quantize="nf4"))
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match=r'model\.lora needs the package peft; pip install "bdpo-pl\[lora\]"'):
        fit(lora_job())


def test_reference_of_another_dtype_is_refused(lora_job):
    with pytest.raises(InputError, match="policy as it was before training, in the policy's own dtype"):
        fit(lora_job(reference_dtype="bfloat16"))
