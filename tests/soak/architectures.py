"""Random tiny architectures of transformers' own configurations, against plain transformers in float64."""

import copy
from contextlib import nullcontext

import torch
from architectures import ARCHITECTURES, EXPERTS, LINEAR, MLA
from makers import large
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from bdpo_pl.data.batches import pair_documents
from bdpo_pl.data.packing import RowLayout, lay_out
from bdpo_pl.data.table import PairTable
from bdpo_pl.data.tokenization import PreferencePair
from bdpo_pl.errors import InputError
from bdpo_pl.forward.prefix_sharing import _objection, choose_layout, probe_documents
from bdpo_pl.forward.responses import response_logps
from bdpo_pl.models.noise import silence_modules, without_noise

BATCH, SECONDS = 20, 60
GOAL = {"compared": 200}

_V = 97
_SIZES = {
    **EXPERTS, **MLA, **{key: value for key, value in LINEAR.items() if key != "layer_types"},
    "vocab_size": _V, "hidden_size": 32, "n_embd": 32, "d_model": 32, "embedding_size": 32, "word_embed_proj_dim": 32,
    "n_layer": 2, "num_hidden_layers": 2, "n_layers": 2, "num_layers": 2, "encoder_layers": 2, "decoder_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "attention_heads": 4, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48, "ffn_dim": 48,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "shared_expert_intermediate_size": 24, "num_local_experts": 4,
    "n_positions": 256, "max_position_embeddings": 256, "state_size": 8,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_OWN = {model_type: options for model_type, options in ARCHITECTURES.values() if "text_config" not in options}
_CHOICES = {
    "num_key_value_heads": [1, 2, 4], "num_hidden_layers": [1, 2, 3], "tie_word_embeddings": [True, False],
    "sliding_window": [None, 4, 8], "hidden_act": ["silu", "gelu", "relu"], "attention_bias": [True, False],
    "use_sliding_window": [True, False], "rms_norm_eps": [1e-6, 1e-3], "final_logit_softcapping": [None, 2.0],
    "attn_logit_softcapping": [None, 5.0], "partial_rotary_factor": [0.5, 1.0], "logit_scale": [0.25, 1.0],
    "qk_layernorm": [True, False], "use_parallel_residual": [True, False], "attention_dropout": [0.0, 0.3],
}  # fmt: skip
_NAMES = []


def prepare():
    """Find the model types of which transformers builds a tiny model, and import them, before any process is forked."""
    if not _NAMES:
        _NAMES.extend(name for name in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) if _build(name, {}, 0) is not None)


def draw(rng):
    """Draw one of those types, with some options of its configuration changed, and a few pairs."""
    changed = {key: rng.choice(values) for key, values in _CHOICES.items() if rng.random() < 0.3}
    lengths = [[rng.randrange(1, 30), rng.randrange(1, 14), rng.randrange(1, 14)] for _ in range(rng.randrange(1, 6))]
    return {"name": rng.choice(_NAMES), "changed": changed, "lengths": lengths, "seed": rng.randrange(1000)}


def _build(name, changed, seed):
    """The model, as the project loads one, or None where transformers itself cannot build or run such a one."""
    try:
        config = AutoConfig.for_model(name)
        wanted = {**_SIZES, **_OWN.get(name, {}), "vocab_size": _V, **changed}
        config = AutoConfig.for_model(name, **{key: value for key, value in wanted.items() if hasattr(config, key)})
        text = config.get_text_config()
        if text.vocab_size > 50_000 or getattr(text, "hidden_size", 0) > 512:
            return None
        with torch.device("meta"):
            if sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters()) > 2_000_000:
                return None
        torch.manual_seed(seed)
        model = silence_modules(AutoModelForCausalLM.from_config(without_noise(config))).double()
        model = large(model, 0.15).eval()
        _alone(model, [3, 4, 5], [6, 7])
    except Exception:
        return None
    return model


@torch.no_grad()
def _logits(model, ids):
    ids = torch.tensor([ids])
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0].double()


def _alone(model, prompt, response):
    at = torch.arange(len(prompt) - 1, len(prompt) + len(response) - 1)
    return _logits(model, prompt + response).log_softmax(-1)[at, torch.tensor(response)].sum()


def _refused_rightly(model, ids):
    """Whether plain transformers shows what a model is refused for: it sees later tokens, or is noisy in training."""
    half = max(1, len(ids) // 2)
    whole = _logits(model, ids)
    changed = _logits(model, [*ids[:half], *((token + 1) % _V for token in ids[half:])])
    model.train()
    noisy = [_logits(model, ids) for _ in range(3)]
    model.eval()
    wrong = [(changed - whole)[:half], *(logits - whole for logits in noisy)]
    return not max(difference.abs().max().item() for difference in wrong) < 1e-9 * whole.abs().max().item()


def check(case, folder, counts):
    """Compare the log-probabilities of all responses in each layout that the project may choose."""
    model = _build(case["name"], case["changed"], case["seed"])
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
    # As a run does, the trial reads two of the pairs in float32; many models have parts in no higher precision.
    table = PairTable.from_pairs(pairs, [3])
    tried = copy.deepcopy(model).float()
    try:
        layouts = {RowLayout.SPLIT, choose_layout(tried, table)}
    except InputError as error:
        # No causal model, or one with noise that cannot be turned off: refused by name.
        counts["refused"] += 1
        longest = max((p.prompt_ids + p.chosen_ids for p in pairs), key=len)
        return None if _refused_rightly(model, longest * 2) else f"{case['name']} is refused without cause: {error}"
    # As on a GPU, where this one is tried first.
    if _objection(tried, probe_documents(table, tried), RowLayout.ONE_ROW, 0, nullcontext) is None:
        layouts.add(RowLayout.ONE_ROW)
    for each in layouts:
        batch, bound = lay_out(pair_documents(pairs), each, 0), 2e-5
        with torch.no_grad():
            found = response_logps(model, batch).double()
            if found.isnan().any():
                # The softmax of eager attention is in float32, which has no number as low as a float64 mask writes:
                # what padding sees is NaN then.
                found, bound = response_logps(tried, batch).double(), 1e-3
        error = ((found - expected).abs() / expected.abs().clamp(min=1.0)).max().item()
        if not error < bound:
            return f"{case['name']}, {each}: log-probabilities off by {error:.3g} of their size"
        counts[f"compared in {each}"] += 1
    counts["compared"] += 1
    return None


def smaller(case):
    """Fewer changed options, fewer pairs."""
    for key in case["changed"]:
        yield {**case, "changed": {k: v for k, v in case["changed"].items() if k != key}}
    for i in range(len(case["lengths"])):
        if len(case["lengths"]) > 1:
            yield {**case, "lengths": case["lengths"][:i] + case["lengths"][i + 1 :]}
