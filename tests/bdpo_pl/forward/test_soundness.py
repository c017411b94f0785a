"""Models that read later tokens, or are noisy in training mode, are found before anything is computed with them."""

from contextlib import nullcontext

import pytest
import torch
from makers import build_model, build_tokenizer, large
from training import fit

from bdpo_pl.data.packing import Document
from bdpo_pl.errors import InputError
from bdpo_pl.forward.soundness import check_sound
from bdpo_pl.losses import BalancedDPOLoss
from bdpo_pl.models.adapters import LoraOptions, add_adapters
from bdpo_pl.models.loading import ModelSource, load_model
from bdpo_pl.models.noise import silence_modules, without_noise

DOCUMENT = Document(list(range(5, 25)), [(0, list(range(30, 50)))])


def sound(model, document=DOCUMENT):
    check_sound(model, document, "M", 0, nullcontext)


@pytest.mark.parametrize("architecture", ["bert", "roberta", "xlnet"])
def test_a_model_that_reads_later_tokens_is_refused(architecture):
    model = build_model(architecture).eval()
    with pytest.raises(InputError, match=r"M .* is not a causal language model: its output at a position changes"):
        sound(model)
    assert not model.training


@pytest.mark.parametrize("architecture", ["qwen2", "gpt2", "mamba", "bloom", "gpt_oss"])
@pytest.mark.parametrize("document", [DOCUMENT, Document([5], [(0, [6])])], ids=["long", "two tokens"])
def test_a_causal_model_is_not(architecture, document):
    overrides = {"mamba": {"state_size": 8}, "bloom": {"n_head": 4, "n_layer": 2}, "gpt_oss": {"head_dim": 8}}
    sound(large(build_model(architecture, **overrides.get(architecture, {}))), document)


NOISY = {
    "opt": {"layerdrop": 0.9, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "xglm": {"layerdrop": 0.9, "d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 64},
    "mixtral": {"router_jitter_noise": 0.5, "num_local_experts": 4},
    "gpt2": {"resid_pdrop": 0.5, "attn_pdrop": 0.5, "embd_pdrop": 0.5},
    "phimoe": {"router_jitter_noise": 0.5, "input_jitter_noise": 0.5, "num_local_experts": 4},
}


@pytest.mark.parametrize("architecture", NOISY)
def test_every_noise_of_the_configuration_is_off(architecture, tmp_path, monkeypatch):
    monkeypatch.setattr("bdpo_pl.models.noise.without_noise", lambda config: config)
    noisy = build_model(architecture, **NOISY[architecture])
    with pytest.raises(InputError, match="computes something else in training mode"):
        sound(large(noisy, 0.1))
    noisy.save_pretrained(tmp_path / "m")
    model = load_model(ModelSource(str(tmp_path / "m")), torch.float32).train()
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        first, second = (model(input_ids=ids, use_cache=False).logits for _ in range(2))
    assert torch.equal(first, second)
    sound(model)
    assert model.training


def test_noise_of_a_nested_configuration_is_off():
    from transformers import AutoConfig

    config = AutoConfig.for_model(
        "gemma3", text_config={"attention_dropout": 0.3}, vision_config={"attention_dropout": 0.2}
    )
    silent = without_noise(config)
    assert silent.text_config.attention_dropout == 0.0
    assert silent.vision_config.attention_dropout == 0.0


def test_noise_that_no_configuration_names_is_off_too():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.5))
    assert silence_modules(model)[1].p == 0.0


def test_adapters_dropout_is_the_users_own():
    model = add_adapters(build_model(), LoraOptions(r=4, dropout=0.5))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    sound(model.train())
    assert all(module.training for module in model.modules())


RUNS = {
    "gpt_oss": {
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 16,
    },
    "bloom": {"n_head": 4, "n_layer": 2},
}


@pytest.mark.parametrize("architecture", RUNS)
@pytest.mark.parametrize(
    "options", [{}, {"prefix_sharing": "never", "lm_head": "logits"}, {"reference_mode": "live"}], ids=str
)
def test_it_trains(architecture, options, tmp_path, job):
    large(build_model(architecture, **RUNS[architecture]), 0.05).save_pretrained(tmp_path / "m")
    build_tokenizer().save_pretrained(tmp_path / "m")
    # `tau: auto` is found from scores, which a live reference has only batch by batch.
    loss = BalancedDPOLoss(tau=0.25)
    trainer, module, data = job(policy=str(tmp_path / "m"), trainer={"max_steps": 2}, loss=loss, **options)
    fit((trainer, module, data))
    assert module.evaluations[0]["held_out/loss"] == pytest.approx(0.693147, abs=1e-5)
