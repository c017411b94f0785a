"""Models that can be read with several sequences in a row, models that cannot, and pairs and errors to try them on."""

import torch
from makers import build_model, large

from bdpo_pl.data.table import PairTable
from bdpo_pl.data.tokenization import PreferencePair

# name: (architecture, options); all from transformers' own configurations.
EXACT = {
    "llama": ("llama", {}),
    "llama3": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}),
    "qwen2": ("qwen2", {}),
    "qwen2, some layers windowed": ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 8}),
    "mistral": ("mistral", {"sliding_window": 7}),
    "gemma2": ("gemma2", {"sliding_window": 7, "attn_logit_softcapping": 5.0}),
    "gemma3": (
        "gemma3_text",
        {"head_dim": 8, "sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "gpt2": ("gpt2", {}),
    "phi3": ("phi3", {"sliding_window": 9}),
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "cohere": ("cohere", {}),
    "olmo2": ("olmo2", {}),
}
INEXACT = {
    "mamba": ("mamba", {"state_size": 8}, "carries a state"),
    "bloom": ("bloom", {"n_head": 4, "n_layer": 2}, "BloomForCausalLM"),
    "mpt": ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2}, "differ from those of responses alone"),
    "falcon with ALiBi": ("falcon", {"alibi": True, "ffn_hidden_size": 64}, "ALiBi"),
    "recurrent_gemma": ("recurrent_gemma", {"lru_width": 32, "attention_window_size": 16}, "carries a state|recurrent"),
}


def pairs(seed=0, n=3, longest=20):
    g = torch.Generator().manual_seed(seed)

    def ids(low, high):
        return torch.randint(5, 400, (int(torch.randint(low, high, (), generator=g)),), generator=g).tolist()

    return [PreferencePair(ids(1, longest), ids(1, 12), ids(1, 12)) for _ in range(n)]


def table(**kwargs):
    return PairTable.from_pairs(pairs(**kwargs), [3, 8])


def model_named(name):
    architecture, options, *_ = (EXACT | INEXACT)[name]
    return large(build_model(architecture, **options)).eval()


NO_MEMORY = {
    "gpu": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "cpu": lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8000000 bytes"),
}
