"""Facts about an architecture: its class, its language model and layers, and its logits' soft-cap and scale."""

from __future__ import annotations

from typing import Any

from torch import nn

from bdpo_pl.models.causal_lm import CausalLM, ModelConfig


def auto_class(config: ModelConfig) -> Any:
    """Return the class of transformers that loads a language model of `config` whole.

    A vision-language model is loaded as one, although only its language model is used: otherwise it would be exported
    without its vision tower.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    whole = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(config.model_type)
    saved = (getattr(config, "architectures", None) or [None])[0]
    if whole is None or getattr(config, "is_encoder_decoder", False):
        return AutoModelForCausalLM
    if saved == whole or config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def text_model(model: CausalLM) -> nn.Module:
    """Return the module of `model` that reads text: `model` itself, or its language model if it has other parts."""
    config = model.config
    text = config.get_text_config()
    if text is config:
        return model
    # Identified by the configuration, because a vision tower has another one.
    found = [module for module in model.modules() if getattr(module, "config", None) is text]
    return found[0] if found else model


def decoder_layers(model: CausalLM) -> nn.ModuleList | None:
    """Return the layers of `model`, in order; None if they are not recognised."""
    number = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    modules = text_model(model).modules()
    lists = [module for module in modules if isinstance(module, nn.ModuleList) and len(module) == number]
    # Accepted only if it is the only list of this length: of two lists, either could be the layers.
    return lists[0] if len(lists) == 1 else None


def logit_transform(config: ModelConfig) -> tuple[float | None, float]:
    """Return soft-cap and scale of the logits after the LM head.

    The names are Gemma's, Cohere's and Granite's.
    """
    text = config.get_text_config()
    scale = getattr(text, "logit_scale", None) or 1.0
    scale /= getattr(text, "logits_scaling", None) or 1.0
    return getattr(text, "final_logit_softcapping", None), scale
