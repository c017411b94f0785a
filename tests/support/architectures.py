"""Tiny random twins of the architectures that people have, by transformers' own configurations."""

import torch

from bdpo_pl.parallel.tensor_parallel import ARCHITECTURES as TENSOR_PARALLEL

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "vocab_size": 400,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 4,
}
MIXED = {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "head_dim": 8,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_channels": 3,
}
MLA = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
}

# name: (model type, options); those that keep a state, or whose positions are in the row, are named below.
ARCHITECTURES = {
    "Llama 2, 3": ("llama", {}),
    "Mistral": ("mistral", {"sliding_window": 7}),
    "Ministral 3": ("ministral3", {"head_dim": 8}),
    "Mixtral": ("mixtral", {"num_local_experts": 4}),
    "Qwen2, Qwen2.5": ("qwen2", {}),
    "Qwen3": ("qwen3", {"head_dim": 8}),
    "Qwen3-MoE": ("qwen3_moe", {"head_dim": 8, **EXPERTS}),
    "Qwen3-Next": ("qwen3_next", {**LINEAR, **EXPERTS, "shared_expert_intermediate_size": 16}),
    "Qwen3.5 (text)": ("qwen3_5_text", LINEAR),
    "Gemma 2": ("gemma2", {"head_dim": 8, "sliding_window": 7, "final_logit_softcapping": 2.0}),
    "Gemma 3 (text)": ("gemma3_text", {"head_dim": 8, **MIXED}),
    "Gemma 4 (text)": (
        "gemma4_text",
        {
            "head_dim": 8,
            "global_head_dim": 16,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 400,
            **MIXED,
        },
    ),
    "gpt-oss": ("gpt_oss", {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, **MIXED}),
    "Phi-3, Phi-4": ("phi3", {"sliding_window": 9}),
    "Phi-3.5-MoE": ("phimoe", {"num_local_experts": 4}),
    "OLMo 2": ("olmo2", {}),
    "OLMo 3": ("olmo3", MIXED),
    "GLM-4": ("glm4", {"head_dim": 8}),
    "GLM-4.5 (MoE)": (
        "glm4_moe",
        {
            "head_dim": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
        },
    ),
    "DeepSeek-V3": ("deepseek_v3", MLA),
    "SmolLM3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "Cohere": ("cohere", {"logit_scale": 0.3}),
    "Granite": ("granite", {"logits_scaling": 3.0}),
    "Falcon-H1": (
        "falcon_h1",
        {
            "mamba_d_ssm": 32,
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
            "mamba_chunk_size": 16,
        },
    ),
    "LFM2": ("lfm2", {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3}),
    "Mamba": ("mamba", {"state_size": 8}),
    "Mamba 2": ("mamba2", {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 16}),
    "Jamba": (
        "jamba",
        {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "expert_layer_offset": 0,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
    ),
    "BLOOM": ("bloom", {"n_head": 4, "n_layer": 2}),
    "GPT-2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}),
    "Gemma 3 (vision)": (
        "gemma3",
        {
            "text_config": {**SIZES, "head_dim": 8, **MIXED},
            "vision_config": {**VISION, "image_size": 28, "patch_size": 14},
            "mm_tokens_per_image": 4,
            "image_token_index": 399,
            "boi_token_index": 397,
            "eoi_token_index": 398,
        },
    ),
    "Gemma 4 (vision)": (
        "gemma4",
        {
            "text_config": {
                **SIZES,
                "head_dim": 8,
                "global_head_dim": 16,
                "hidden_size_per_layer_input": 8,
                "vocab_size_per_layer_input": 400,
                **MIXED,
            },
            "vision_config": {**VISION, "head_dim": 8},
            "audio_config": None,
            "image_token_id": 399,
            "audio_token_id": 398,
            "video_token_id": 397,
            "boi_token_id": 396,
            "eoi_token_id": 395,
            "boa_token_id": 394,
            "eoa_token_id": 393,
        },
    ),
    "Qwen3-VL": (
        "qwen3_vl",
        {
            "text_config": {
                **SIZES,
                "head_dim": 8,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "mrope_section": [2, 1, 1],
                    "mrope_interleaved": True,
                },
            },
            "vision_config": {
                "depth": 2,
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_heads": 4,
                "out_hidden_size": 32,
                "deepstack_visual_indexes": [0],
                "num_position_embeddings": 16,
            },
            "image_token_id": 399,
            "video_token_id": 398,
            "vision_start_token_id": 397,
            "vision_end_token_id": 396,
        },
    ),
    "Qwen3.5 (vision)": (
        "qwen3_5",
        {
            "text_config": {**SIZES, **LINEAR},
            "vision_config": {
                "depth": 2,
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_heads": 4,
                "out_hidden_size": 32,
                "num_position_embeddings": 16,
            },
            "image_token_id": 399,
            "video_token_id": 398,
            "vision_start_token_id": 397,
            "vision_end_token_id": 396,
        },
    ),
    "Mistral 3 (vision)": (
        "mistral3",
        {
            "text_config": {**SIZES, "model_type": "mistral", "sliding_window": None},
            "vision_config": {**VISION, "model_type": "pixtral", "image_size": 28, "patch_size": 14, "head_dim": 8},
            "image_token_index": 399,
        },
    ),
}


SPLIT = {
    "Qwen3-Next": "state",
    "Qwen3.5 (text)": "state",
    "Qwen3.5 (vision)": "state",
    "Falcon-H1": "state",
    "LFM2": "conv layers",
    "Mamba": "state",
    "Mamba 2": "state",
    "Jamba": "state",
    "BLOOM": "ALiBi",
}
"""Those that read each response in a row of its own, and why."""
VISION_PARTS = {
    "Gemma 3 (vision)": {"model.multi_modal_projector", "model.vision_tower"},
    "Gemma 4 (vision)": {"model.embed_vision", "model.vision_tower"},
    "Qwen3-VL": {"model.visual"},
    "Qwen3.5 (vision)": {"model.visual"},
    "Mistral 3 (vision)": {"model.multi_modal_projector", "model.vision_tower"},
}
"""What text never reaches."""


def tiny_config(name, **changes):
    """The configuration of a tiny model of the architecture of this name."""
    from transformers import AutoConfig

    from bdpo_pl.models.noise import without_noise

    model_type, options = ARCHITECTURES[name]
    sizes = SIZES
    if model_type == "gpt2":
        sizes = {"vocab_size": 400, "bos_token_id": 1, "eos_token_id": 4}
    if "text_config" in options:
        from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as CLASSES

        sizes = {"architectures": [CLASSES[model_type]]}
    return without_noise(AutoConfig.for_model(model_type, **{**sizes, **options, **changes}))


def tiny(name):
    """A model of the architecture of this name with random weights, as its whole class."""
    from bdpo_pl.models.architectures import auto_class
    from bdpo_pl.models.noise import silence_modules

    config = tiny_config(name)
    torch.manual_seed(0)
    return silence_modules(auto_class(config).from_config(config, dtype=torch.float32))


def pages_table():
    """The table of docs/models.md, in Markdown."""
    lines = [
        "| architecture | model type | prompt read once | pairs in one row | LM head + loss fused | tensor parallel |",
        "|---|---|---|---|---|---|",
    ]
    for name, (model_type, _) in sorted(ARCHITECTURES.items(), key=lambda item: item[0].lower()):
        why = SPLIT.get(name)
        shared = "yes" if why is None else f"no: {why}"
        parallel = "yes" if model_type in TENSOR_PARALLEL else "–"
        packed = "yes" if why is None else "no"
        lines.append(f"| {name} | `{model_type}` | {shared} | {packed} | yes | {parallel} |")
    return "\n".join(lines)
