"""Random tiny architectures of transformers' own configurations, against plain transformers in float64."""

import torch
from makers import large
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from bdpo_pl.data.batches import pair_documents
from bdpo_pl.data.packing import RowLayout, lay_out
from bdpo_pl.data.table import PairTable
from bdpo_pl.data.tokenization import PreferencePair
from bdpo_pl.errors import InputError
from bdpo_pl.forward.prefix_sharing import choose_layout
from bdpo_pl.forward.responses import response_logps

BATCH, SECONDS = 10, 60

_V = 97
_SIZES = {
    "vocab_size": _V, "hidden_size": 32, "n_embd": 32, "d_model": 32, "n_layer": 2, "num_hidden_layers": 2,
    "n_layers": 2, "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size": 48, "ffn_dim": 48, "n_positions": 256, "max_position_embeddings": 256, "num_local_experts": 4,
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_CHOICES = {
    "num_key_value_heads": [1, 2, 4], "num_hidden_layers": [1, 2, 3], "tie_word_embeddings": [True, False],
    "sliding_window": [None, 4, 8], "hidden_act": ["silu", "gelu", "relu"], "attention_bias": [True, False],
    "use_sliding_window": [True, False], "rms_norm_eps": [1e-6, 1e-3], "final_logit_softcapping": [None, 2.0],
    "attn_logit_softcapping": [None, 5.0], "partial_rotary_factor": [0.5, 1.0], "logit_scale": [0.25, 1.0],
    "qk_layernorm": [True, False], "use_parallel_residual": [True, False], "attention_dropout": [0.0, 0.3],
}  # fmt: skip


def draw(rng):
    name = rng.choice(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    changed = {key: rng.choice(values) for key, values in _CHOICES.items() if rng.random() < 0.3}
    lengths = [[rng.randrange(1, 30), rng.randrange(1, 14), rng.randrange(1, 14)] for _ in range(rng.randrange(1, 4))]
    return {"name": name, "changed": changed, "lengths": lengths, "seed": rng.randrange(1000)}


def _build(case):
    """The model, or None where transformers itself cannot build or run such a one."""
    try:
        config = AutoConfig.for_model(case["name"])
        known = {key: value for key, value in {**_SIZES, **case["changed"]}.items() if hasattr(config, key)}
        config = AutoConfig.for_model(case["name"], **known)
        if config.get_text_config().vocab_size > 50_000 or getattr(config.get_text_config(), "hidden_size", 0) > 512:
            return None
        with torch.device("meta"):
            if sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters()) > 2_000_000:
                return None
        torch.manual_seed(case["seed"])
        model = AutoModelForCausalLM.from_config(config).double()
        model = large(model, 0.15).eval()
        _alone(model, [3, 4, 5], [6, 7])
    except Exception:
        return None
    return model


@torch.no_grad()
def _alone(model, prompt, response):
    ids = torch.tensor([prompt + response])
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    at = torch.arange(len(prompt) - 1, ids.shape[1] - 1)
    return logits[0].double().log_softmax(-1)[at, ids[0, at + 1]].sum()


def prepare():
    pass


def check(case, folder, counts):
    model = _build(case)
    if model is None:
        counts["not built by transformers"] += 1
        return None
    generator = torch.Generator().manual_seed(case["seed"])
    pairs = [
        PreferencePair(*(torch.randint(3, _V, (n,), generator=generator).tolist() for n in lengths))
        for lengths in case["lengths"]
    ]
    expected = torch.stack(
        [_alone(model, p.prompt_ids, getattr(p, side)) for side in ("chosen_ids", "rejected_ids") for p in pairs]
    )
    try:
        layout = choose_layout(model, PairTable.from_pairs(pairs, [3]))
    except InputError:
        # No causal model, or one with noise that cannot be turned off: refused by name.
        counts["refused"] += 1
        return None
    for each in {RowLayout.SPLIT, layout}:
        with torch.no_grad():
            found = response_logps(model, lay_out(pair_documents(pairs), each, 0)).double()
        error = ((found - expected).abs() / expected.abs().clamp(min=1.0)).max().item()
        if not error < 2e-5:
            return f"{case['name']}, {each}: log-probabilities off by {error:.3g} of their size"
    counts["compared"] += 1
    counts[f"compared in {layout}"] += 1
    return None


def smaller(case):
    for key in case["changed"]:
        yield {**case, "changed": {k: v for k, v in case["changed"].items() if k != key}}
    for i in range(len(case["lengths"])):
        if len(case["lengths"]) > 1:
            yield {**case, "lengths": case["lengths"][:i] + case["lengths"][i + 1 :]}
