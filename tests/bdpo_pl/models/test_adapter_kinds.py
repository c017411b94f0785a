"""Kinds of adapters: each begins as the model it stands on, and what is exported computes what was trained."""

import copy
import math
import shutil

import pytest
import torch
from adapters import sft_adapter
from architectures import tiny
from makers import build_model, build_tokenizer, preference_rows, write_jsonl
from training import fit, same, weights

from bdpo_pl.errors import InputError
from bdpo_pl.losses import DPOLoss
from bdpo_pl.models.adapter_export import export_adapter, merged
from bdpo_pl.models.adapter_folder import CONFIG, WEIGHTS
from bdpo_pl.models.adapters import LoraOptions, add_adapters, is_adapter
from bdpo_pl.models.before_training import BeforeTraining, adapters_off
from bdpo_pl.models.checkpoint import checkpoint_model, plain_model
from bdpo_pl.models.loading import ModelSource, load_model
from bdpo_pl.parallel.state import whole_state

IDS = torch.arange(5, 40)[None]
SHORT = {"max_steps": 3, "val_check_interval": 3}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.fixture(autouse=True)
def few_pairs(job, tmp_path):
    write_jsonl(tmp_path / "pairs.jsonl", preference_rows(16))


def options(**changes):
    return LoraOptions(**{"r": 4, **changes})


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a model, of one with a tied head, and of a mixture of experts."""
    folder = tmp_path_factory.mktemp("models")
    for name, model in (
        ("plain", build_model()), ("tied", build_model(tie_word_embeddings=True)), ("experts", tiny("Qwen3-MoE")),
    ):  # fmt: skip
        model.save_pretrained(folder / name)
        build_tokenizer().save_pretrained(folder / name)
    return folder


KINDS = {
    "dora, whole head": ("plain", {"dora": True, "modules_to_save": ["lm_head"]}),
    "dora, embedding": ("plain", {"dora": True, "target_modules": ["embed_tokens", "q_proj"]}),
    "pissa, rank-stabilised": ("plain", {"init": "pissa_niter_8", "rslora": True}),
    "olora": ("plain", {"init": "olora"}),
    "whole, tied": ("tied", {"modules_to_save": ["embed_tokens"]}),
    "embedding, tied": ("tied", {"target_modules": ["embed_tokens", "q_proj"]}),
    "head": ("plain", {"target_modules": ["lm_head", "q_proj"]}),
    "experts": ("experts", {"target_parameters": EXPERTS, "modules_to_save": ["lm_head"]}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_first_loss_is_ln_2_and_both_exports_compute_what_was_trained(job, models, tmp_path, kind):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    name, changes = KINDS[kind]
    lora = options(**changes)
    module = fit(job(policy=str(models / name), lora=lora, loss=DPOLoss(), trainer=dict(SHORT)))
    assert module.evaluations[0]["held_out/loss"] == pytest.approx(math.log(2), abs=1e-6)
    expected = logits(module.policy)
    plain = AutoModelForCausalLM.from_pretrained(models / name)
    assert (logits(plain) - expected).abs().max() > 1e-3
    if lora.modules_to_save is None:
        with adapters_off(module.policy) as reference:
            assert torch.equal(logits(reference), logits(plain))
    state = whole_state(module.policy, trained_only=True)
    close = {"rtol": 1e-4, "atol": 1e-5}
    plain_model(module.source, torch.float32, state, lora).save_pretrained(tmp_path / "merged")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(whole), expected, **close)
    export_adapter(load_model(module.source, torch.float32), lora, state, tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), expected, **close)
    assert not (tmp_path / "adapter" / "adapter_model.bin").exists()


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_training_is_that_of_pefts_own_start(init):
    """Which takes the start out of the base model's weights, where ours leaves them."""
    from peft import LoraConfig, get_peft_model

    ours = add_adapters(build_model(), options(alpha=6, init=init))
    config = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "init_lora_weights": init}
    theirs = get_peft_model(build_model(), LoraConfig(**config))
    for model in (ours, theirs):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        for _ in range(4):
            optimizer.zero_grad()
            model(IDS, labels=IDS).loss.backward()
            optimizer.step()
    assert (logits(ours) - logits(build_model())).abs().max() > 1e-2
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-3, atol=1e-4)


def test_norms_of_dora_start_as_pefts():
    from peft import LoraConfig, get_peft_model

    modules = ["embed_tokens", "q_proj", "down_proj"]
    ours = add_adapters(build_model(), options(dora=True, target_modules=modules))
    theirs = get_peft_model(build_model(), LoraConfig(r=4, use_dora=True, target_modules=modules))
    expected = {n.removeprefix("base_model.model."): p for n, p in theirs.named_parameters() if "magnitude" in n}
    found = {n: p for n, p in ours.named_parameters() if "magnitude" in n}
    assert found.keys() == expected.keys()
    for name, parameter in found.items():
        torch.testing.assert_close(parameter, expected[name])


def test_pissa_starts_as_the_model_to_the_last_bit_and_its_base_stays():
    model, plain = build_model(), build_model()
    add_adapters(model, options(init="pissa"))
    assert torch.equal(logits(model), logits(plain))
    base = {n.replace(".base_layer", ""): p for n, p in model.named_parameters() if not is_adapter(n)}
    assert same(base, dict(plain.named_parameters()))


def test_resuming_from_a_weight_s_strongest_part_is_exact(job, tmp_path):
    from lightning.pytorch.callbacks import ModelCheckpoint

    keep = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=2, save_top_k=-1, filename="{step}")
    make = {"lora": options(init="pissa"), "loss": DPOLoss()}
    whole = fit(job("whole", trainer={"max_steps": 4, "callbacks": [keep]}, **make))
    path = tmp_path / "ckpt" / "step=2.ckpt"
    assert same(weights(whole), weights(fit(job("again", trainer={"max_steps": 4}, **make), ckpt_path=str(path))))
    at_the_end = checkpoint_model(tmp_path / "ckpt" / "step=4.ckpt", whole.source, torch.float32)
    torch.testing.assert_close(logits(at_the_end), logits(whole.policy), rtol=1e-4, atol=1e-5)


# An adapter that was there


SFT = {
    "dora, whole head": {"use_dora": True, "modules_to_save": ["lm_head"]},
    "pattern": {"rank_pattern": {"down_proj": 3}, "alpha_pattern": {"down_proj": 5}, "use_rslora": True},
}


@pytest.mark.parametrize("kind", SFT)
def test_an_adapter_is_trained_on_and_is_the_reference(job, model_dir, tmp_path, kind):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    sft = sft_adapter(model_dir, tmp_path / "sft", **SFT[kind])
    lora = LoraOptions(adapter=str(tmp_path / "sft"))
    if kind == "pattern":
        # The base model's own scores are in the cache.
        fit(job("base", loss=DPOLoss(), lora=options(), trainer={"max_steps": 1, "limit_val_batches": 0}))
    module = fit(job("run", loss=DPOLoss(), lora=lora, trainer=dict(SHORT)))
    assert module.evaluations[0]["held_out/loss"] == pytest.approx(math.log(2), abs=1e-6)
    # Against peft alone, a pair at a time.
    table = module.splits.tables["held_out"]
    scores = module.reference.scores("held_out", torch.arange(3)).reference
    for i in range(3):
        pair = table[i]
        for side, response in enumerate((pair.chosen_ids, pair.rejected_ids)):
            ids = torch.tensor([[*pair.prompt_ids, *response]])
            with torch.no_grad():
                logps = sft.eval()(ids).logits.log_softmax(-1)[0, len(pair.prompt_ids) - 1 : -1]
            expected = logps.gather(1, torch.tensor(response)[:, None]).sum()
            torch.testing.assert_close(scores[side, i], expected, rtol=1e-5, atol=1e-4)
    expected = logits(module.policy)
    assert (logits(sft) - expected).abs().max() > 1e-3
    state = whole_state(module.policy, trained_only=True)
    export_adapter(load_model(module.source, torch.float32), lora, state, tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-5)
    whole = merged(load_model(module.source, torch.float32), lora, state)
    torch.testing.assert_close(logits(whole), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_live_reference_is_the_adapter_as_it_was(job, model_dir, tmp_path, precision):
    """With a head trained whole, of which autocast keeps casts from one pass to the next."""
    sft_adapter(model_dir, tmp_path / "sft", modules_to_save=["lm_head"])
    make = {"lora": LoraOptions(adapter=str(tmp_path / "sft")), "loss": DPOLoss()}
    precomputed = fit(job("a", trainer={**SHORT, "precision": precision}, **make))
    live = fit(job("b", trainer={**SHORT, "precision": precision}, reference_mode="live", **make))
    bound = 1e-5 if precision == "32-true" else 2e-2
    assert live.evaluations[3] == pytest.approx(precomputed.evaluations[3], abs=bound)
    with live.before_training() as model:
        before = logits(model)
    assert not torch.equal(before, logits(live.policy))


def test_a_checkpoint_of_an_adapter_needs_its_folder_no_more(job, model_dir, tmp_path):
    from lightning.pytorch.callbacks import ModelCheckpoint

    sft_adapter(model_dir, tmp_path / "sft")
    keep = ModelCheckpoint(tmp_path / "ckpt", filename="end")
    make = {"lora": LoraOptions(adapter=str(tmp_path / "sft")), "loss": DPOLoss()}
    module = fit(job(trainer={"max_steps": 2, "callbacks": [keep]}, **make))
    shutil.rmtree(tmp_path / "sft")
    found = checkpoint_model(tmp_path / "ckpt" / "end.ckpt", module.source, torch.float32)
    torch.testing.assert_close(logits(found), logits(module.policy), rtol=1e-4, atol=1e-5)


def test_the_base_is_the_reference_only_where_it_is_named(job, model_dir, tmp_path):
    sft_adapter(model_dir, tmp_path / "sft")
    lora = LoraOptions(adapter=str(tmp_path / "sft"))
    module = fit(job(lora=lora, loss=DPOLoss(), reference=str(model_dir), trainer={"max_steps": 1}))
    assert abs(module.evaluations[0]["held_out/loss"] - math.log(2)) > 1e-3


def test_before_training_is_given_back_after_an_error(model_dir, tmp_path):
    sft_adapter(model_dir, tmp_path / "sft", modules_to_save=["lm_head"])
    lora = LoraOptions(adapter=str(tmp_path / "sft"))
    model = add_adapters(load_model(ModelSource(str(model_dir)), torch.float32), lora)
    before, start = BeforeTraining(model, lora), logits(model)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.01
    trained = logits(model)
    with before.of(model):
        assert torch.equal(logits(model), start)
    with pytest.raises(RuntimeError), before.of(model):
        raise RuntimeError
    assert torch.equal(logits(model), trained)
    assert not torch.equal(trained, start)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_frozen_starts_stay_frozen_after_adapters_were_off(model_dir, init):
    lora = options(init=init)
    model = add_adapters(load_model(ModelSource(str(model_dir)), torch.float32), lora)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    with BeforeTraining(model, lora).of(model) as reference:
        logits(reference)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    for _ in range(2):
        model(IDS).logits.square().mean().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trained


# Learning rates


def test_lora_plus_gives_b_its_own_rate_as_peft_does(job):
    from peft import LoraConfig, get_peft_model
    from peft.optimizers import create_loraplus_optimizer

    trainer, module, data = job(
        lora=options(lr_ratio=16.0), loss=DPOLoss(), trainer={"max_steps": 2, "limit_val_batches": 0},
        lr_schedule="constant", warmup_ratio=0.0,
    )  # fmt: skip
    trainer.fit(module, data)
    theirs = get_peft_model(build_model(), LoraConfig(r=4, target_modules="all-linear"))
    oracle = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=2e-3, loraplus_lr_ratio=16.0)

    def rates(model, optimizer):
        by_id = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        return {
            n.removeprefix("base_model.model."): by_id[id(p)] for n, p in model.named_parameters() if id(p) in by_id
        }

    assert rates(module.policy, trainer.optimizers[0]) == pytest.approx(rates(theirs, oracle))
    start = dict(add_adapters(build_model(), options()).named_parameters())
    for name, p in module.policy.named_parameters():
        if ".lora_B." in name and "layers.1" in name:
            # Two steps of Adam are two rates at most.
            assert 16e-3 < (p - start[name]).abs().max() < 2 * 32.1e-3


# What does not fit


def test_alpha_is_twice_the_rank_unless_it_is_given():
    assert (LoraOptions().r, LoraOptions().alpha) == (16, 32)
    assert LoraOptions(r=64).alpha == 128
    assert LoraOptions(r=64, alpha=16).alpha == 16
    assert LoraOptions(target_parameters=EXPERTS).target_modules is None


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"init": "svd"}, "init must be zero, pissa"),
        ({"init": "pissa", "dora": True}, "init pissa does not go with model.lora.dora"),
        ({"init": "olora", "quantize": "nf4"}, "does not go with model.lora.quantize nf4"),
        ({"init": "pissa", "target_parameters": EXPERTS}, "does not go with model.lora.target_parameters"),
        ({"lr_ratio": 0.0}, "lr_ratio must be above 0"),
        ({"adapter": "/nowhere"}, "no adapter_config.json in '/nowhere'"),
        ({"adapter": "/nowhere", "r": 8, "dora": True}, "brings its own r, dora: leave out model.lora.r"),
    ],
)
def test_options_that_do_not_fit_are_named(values, fault):
    with pytest.raises(InputError, match=fault):
        LoraOptions(**values)


@pytest.mark.parametrize(
    ("lora", "fault"),
    [
        ({"init": "pissa", "r": 40}, r"model.lora.r is 40, but .*q_proj, whose rank is at most 32"),
        ({"init": "pissa", "target_modules": ["embed_tokens"]}, "starts from the weights of linear layers"),
        ({"modules_to_save": ["nothing"]}, "names 'nothing', but no module"),
        ({"modules_to_save": ["q_proj"]}, "has an adapter"),
    ],
)
def test_adapters_that_do_not_fit_the_model_are_named(lora, fault):
    with pytest.raises(InputError, match=fault):
        add_adapters(build_model(), options(**lora))


def test_an_adapter_that_does_not_fit_is_named(model_dir, models, tmp_path):
    import json

    from safetensors.torch import load_file, save_file

    sft_adapter(model_dir, tmp_path / "sft")

    def changed(**values):
        shutil.copytree(tmp_path / "sft", folder := tmp_path / "changed", dirs_exist_ok=True)
        config = json.loads((tmp_path / "sft" / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**config, **values}))
        return str(folder)

    for values, fault in (
        ({"peft_type": "IA3"}, "is a IA3 adapter"),
        ({"bias": "all"}, "bias is 'all', which would be lost"),
        ({"init_lora_weights": "pissa"}, "changed the base model's weights"),
    ):
        with pytest.raises(InputError, match=fault):
            LoraOptions(adapter=changed(**values))
    with pytest.raises(InputError, match="has new_thing, which the installed peft does not know"):
        add_adapters(build_model(), LoraOptions(adapter=changed(new_thing=3)))
    with pytest.raises(InputError, match=r"has no weights for .*v_proj"):
        add_adapters(build_model(), LoraOptions(adapter=changed(target_modules=["q_proj", "v_proj", "down_proj"])))
    with pytest.raises(InputError, match="has 4 weights for which the policy has no place"):
        add_adapters(build_model(), LoraOptions(adapter=changed(target_modules=["q_proj"])))
    with pytest.raises(InputError, match="belongs to another model"):
        add_adapters(build_model(hidden_size=64), LoraOptions(adapter=changed()))
    tensors = load_file(tmp_path / "sft" / WEIGHTS)
    (tmp_path / "changed" / WEIGHTS).write_bytes(b"not whole")
    with pytest.raises(InputError, match="not a whole safetensors file"):
        add_adapters(build_model(), LoraOptions(adapter=str(tmp_path / "changed")))
    (tmp_path / "changed" / WEIGHTS).unlink()
    with pytest.raises(InputError, match="pickled weights are not read"):
        add_adapters(build_model(), LoraOptions(adapter=str(tmp_path / "changed")))
    # One of two modules that are one weight here.
    changed(modules_to_save=["embed_tokens"])
    name = "base_model.model.model.embed_tokens.weight"
    save_file({**tensors, name: copy.deepcopy(build_model().get_input_embeddings().weight.data)},
              tmp_path / "changed" / WEIGHTS)  # fmt: skip
    lora = LoraOptions(adapter=str(tmp_path / "changed"))
    add_adapters(build_model(), lora)
    with pytest.raises(InputError, match="the adapter took them apart"):
        add_adapters(build_model(tie_word_embeddings=True), lora)
